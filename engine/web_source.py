"""Adapters on web servers: a directory, or an archive of one. Knows no allow-list (it is given the check).

Names are resolved once, checked, and the connection goes to the checked address, so that a name cannot point elsewhere
when it is used (DNS rebinding); every redirect is checked like the first address.
"""

import asyncio
import io
import ipaddress
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from posixpath import basename
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE
from engine.sources import SIDE_FILES, Limits, RemoteSource, SourceUnreachableError, check_size, token_for

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
MAX_REDIRECTS = 5
WANTED = (CONFIG_FILE, WEIGHTS_FILE, *SIDE_FILES)


class WebSource(RemoteSource):
    """`https://host/path/` with the files beneath it, or `https://host/path.tar.gz` (or .tgz, .tar, .zip)."""

    def __init__(self, uri: str, limits: Limits, check_allowed: Callable[[str], None]) -> None:
        self._uri = uri
        self._limits = limits
        self._check_allowed = check_allowed
        self._is_archive = urlsplit(uri).path.endswith(ARCHIVES)

    def signature(self) -> str:
        names = [None] if self._is_archive else [WEIGHTS_FILE, CONFIG_FILE]
        return asyncio.run(self._signature([self._address(name) for name in names]))

    def fetch(self) -> dict[str, bytes]:
        return asyncio.run(self._fetch())

    def _address(self, name: str | None) -> str:
        return self._uri if name is None else f"{self._uri.rstrip('/')}/{name}"

    async def _signature(self, addresses: list[str]) -> str:
        seen = []
        async with self._session() as session:
            for address in addresses:
                headers, _ = await self._get(session, "HEAD", address, 0)
                seen.append([headers.get(key, "") for key in ("ETag", "Last-Modified", "Content-Length")])
        return repr(seen)

    async def _fetch(self) -> dict[str, bytes]:
        async with self._session() as session:
            if self._is_archive:
                limit = self._limits.weights_bytes + 2**20
                _, archive = await self._get(session, "GET", self._uri, limit)
                return unpack(urlsplit(self._uri).path, archive, self._limits)
            files = {}
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                _, files[name] = await self._get(session, "GET", self._address(name), self._limits.of(name))
            for name in SIDE_FILES:
                try:
                    _, files[name] = await self._get(
                        session, "GET", self._address(name), self._limits.of(name)
                    )
                except AdapterNotFoundError:
                    continue
            return files

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=CheckedResolver(self._limits.allow_private)),
            timeout=aiohttp.ClientTimeout(
                total=self._limits.total_s, sock_connect=self._limits.stall_s, sock_read=self._limits.stall_s
            ),
            auto_decompress=False,
        )

    async def _get(
        self, session: aiohttp.ClientSession, method: str, address: str, limit: int
    ) -> tuple[dict[str, str], bytes]:
        """Headers and body, following redirects as far as they are allowed."""
        name = basename(urlsplit(address).path)
        try:
            for _ in range(MAX_REDIRECTS):
                self._check_allowed(address)
                host = urlsplit(address).hostname or ""
                check_literal(host, self._limits.allow_private)
                token = token_for(host)
                headers = {"Accept-Encoding": "identity"}
                if token:
                    headers["Authorization"] = f"Bearer {token}"
                async with session.request(
                    method, address, headers=headers, allow_redirects=False
                ) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        address = urljoin(address, response.headers["Location"])
                        continue
                    if response.status in (404, 410):
                        raise AdapterNotFoundError(f"{name}: {host} has no such file")
                    if response.status >= 500 or response.status == 429:
                        raise SourceUnreachableError(f"{name}: {host} answers {response.status}")
                    if response.status != 200:
                        raise AdapterError(f"{name}: {host} answers {response.status}")
                    return dict(response.headers), await _body(response, name, limit)
            raise AdapterError(f"{name}: more than {MAX_REDIRECTS} redirects")
        except TimeoutError as error:
            raise SourceUnreachableError(f"{name}: the source does not answer in time") from error
        except aiohttp.ClientPayloadError as error:
            raise SourceUnreachableError(f"{name}: the source broke off") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error.__cause__, AdapterError):
                raise error.__cause__ from error
            raise SourceUnreachableError(f"{name}: cannot be fetched: {type(error).__name__}") from error


async def _body(response: aiohttp.ClientResponse, name: str, limit: int) -> bytes:
    """The body, never more than `limit` bytes of it in memory whatever the headers say."""
    if response.method == "HEAD":
        return b""
    data = bytearray()
    async for chunk in response.content.iter_chunked(2**18):
        data += chunk
        if len(data) > limit:
            raise AdapterError(
                f"{name}: more than {limit} bytes, which is more than is possible for this base"
            )
    return bytes(data)


class CheckedResolver(AbstractResolver):
    """Gives only addresses that may be connected to; the connector then uses exactly those."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for each in found:
            check_literal(each["host"], self._allow_private, host)
        return found

    async def close(self) -> None:
        await self._inner.close()


def check_literal(host: str, allow_private: bool, name: str | None = None) -> None:
    """Raise `AdapterError` when `host` is an address (not a name) that only the network inside can reach."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return
    mapped = getattr(address, "ipv4_mapped", None)
    if not allow_private and not (mapped or address).is_global:
        raise AdapterError(f"{name or host} is at a private address, which the engine does not connect to")


def unpack(path: str, archive: bytes, limits: Limits) -> dict[str, bytes]:
    """An adapter's files out of an archive; nothing else in it is read, and nothing is written anywhere."""
    files: dict[str, bytes] = {}
    try:
        for name, read in _members(path, archive, limits):
            if name in files:
                raise AdapterError(f"the archive holds {name} twice")
            files[name] = read()
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
    ) as error:
        raise AdapterError(f"the archive is damaged: {type(error).__name__}") from error
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise AdapterError(f"the archive holds no {name}")
    return files


def _members(path: str, archive: bytes, limits: Limits) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if path.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(archive)) as bundle:
            for entry in bundle.infolist():
                if basename(entry.filename) in WANTED and not entry.is_dir():
                    name = basename(entry.filename)
                    check_size(name, entry.file_size, limits)
                    with bundle.open(entry) as file:
                        yield (
                            name,
                            lambda file=file, name=name: _at_most(
                                file.read(limits.of(name) + 1), name, limits
                            ),
                        )
        return
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as bundle:
        for member in bundle:
            if basename(member.name) in WANTED and member.isfile():
                name = basename(member.name)
                check_size(name, member.size, limits)
                file = bundle.extractfile(member)
                if file is not None:
                    yield (
                        name,
                        lambda file=file, name=name: _at_most(file.read(limits.of(name) + 1), name, limits),
                    )


def _at_most(data: bytes, name: str, limits: Limits) -> bytes:
    check_size(name, len(data), limits)
    return data
