"""Where adapters come from: local directories, the Hugging Face hub, object stores, web servers. Knows no tensors.

What is fetched is data from somebody else, from an address somebody else may have chosen: only sources on the allow-list
are asked, only the files of an adapter are read, sizes and times are bounded while reading, and no connection is made to
an address inside the network unless that is allowed.
"""

import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from engine.disk_cache import DiskCache
from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE
from engine.protocol import AdapterRef

log = structlog.get_logger()

PICKLE_FILE = "adapter_model.bin"
SIDE_FILES = ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json")
"""What an adapter may bring along for the text side."""
MAX_SIDE_BYTES = 32 * 2**20
LOCAL = "file://"


class SourceUnreachableError(AdapterError):
    """The source does not answer; what was fetched before may still be used."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one fetch."""

    weights_bytes: int
    """An adapter for the base cannot be larger."""
    total_s: float = 600.0
    stall_s: float = 30.0
    """Without a byte."""
    allow_private: bool = False
    """Whether web sources may lie at private, loopback or link-local addresses."""

    def of(self, name: str) -> int:
        return self.weights_bytes if name == WEIGHTS_FILE else MAX_SIDE_BYTES


class RemoteSource:
    """One remote adapter. Both methods block, and raise `AdapterError`."""

    def signature(self) -> str:
        """Changes when the adapter is published anew."""
        raise NotImplementedError

    def fetch(self) -> dict[str, bytes]:
        """The contents of its files."""
        raise NotImplementedError


class Sources:
    """Every source an engine may use, behind one allow-list and one disk cache.

    Args:
        allowed: Beginnings of URIs: `file://` for every local directory, a path, `hf://org/`, `s3://bucket/`,
            `https://host/`.
        recheck_s: How long a remote adapter is taken for unchanged without asking.
    """

    def __init__(
        self,
        allowed: tuple[str, ...],
        cache: DiskCache,
        limits: Limits,
        recheck_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed = allowed
        self._cache = cache
        self._limits = limits
        self._recheck_s = recheck_s
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._checkers = ThreadPoolExecutor(2, "adapter-recheck")

    def version_of(self, ref: AdapterRef) -> Hashable:
        """Changes when the adapter is published anew. Never waits for a network: remote ones are asked later.

        Raises `AdapterNotFoundError` when nothing is there, `AdapterError` when it cannot be used.
        """
        if ref.parts:
            return tuple(self.version_of(part.ref) for part in ref.parts)
        self._check_allowed(ref.uri)
        if is_local(ref.uri):
            return local_version(ref.uri)
        with self._lock:
            known = self._known.setdefault(ref.uri, _Known())
            due = known.signature is not None and self._clock() - known.checked_s > self._recheck_s
            if due and not known.checking:
                known.checking = True
                self._checkers.submit(self._recheck, ref.uri)
            return known.generation

    def read(self, uri: str) -> dict[str, bytes]:
        """The adapter's files by name. Blocks. Raises `AdapterError`."""
        self._check_allowed(uri)
        if is_local(uri):
            return read_directory(uri, self._limits)
        source = self._open(uri)
        try:
            signature = source.signature()
            files = self._cache.get(uri, signature)
            if files is None:
                files = source.fetch()
                self._cache.put(uri, signature, files)
        except SourceUnreachableError as error:
            files = self._cache.get(uri, None)
            if files is None:
                raise
            log.warning("adapter_from_disk", uri=uri, reason=str(error))
            return files
        with self._lock:
            known = self._known.setdefault(uri, _Known())
            known.signature, known.checked_s = signature, self._clock()
        return files

    def side_files(self, uri: str) -> dict[str, bytes]:
        """What the adapter brought for the text side. Blocks. Raises `AdapterError`."""
        self._check_allowed(uri)
        if not is_local(uri):
            return {name: content for name, content in self.read(uri).items() if name in SIDE_FILES}
        local_version(uri)
        return _side_files(local_directory(uri), self._limits)

    def _recheck(self, uri: str) -> None:
        """On a thread of its own: has it been published anew?"""
        signature = None
        try:
            signature = self._open(uri).signature()
        except AdapterError as error:
            log.warning("adapter_not_rechecked", uri=uri, reason=str(error))
        finally:
            with self._lock:
                known = self._known[uri]
                if signature is not None and signature != known.signature:
                    known.generation += 1
                    known.signature = signature
                known.checked_s, known.checking = self._clock(), False

    def _open(self, uri: str) -> RemoteSource:
        scheme = urlsplit(uri).scheme
        if scheme == "hf":
            from engine.hub_source import HubSource

            return HubSource(uri, self._limits)
        if scheme in ("https", "http"):
            from engine.web_source import WebSource

            return WebSource(uri, self._limits, self._check_allowed)
        from engine.store_source import StoreSource

        return StoreSource(uri, self._limits)

    def _check_allowed(self, uri: str) -> None:
        if is_local(uri):
            place = local_directory(uri)
            for allowed in self._allowed:
                if allowed == LOCAL:
                    return
                if is_local(allowed) and place.resolve().is_relative_to(local_directory(allowed).resolve()):
                    return
            raise AdapterError("its directory is outside of the engine's adapter_sources")
        for allowed in self._allowed:
            beginning = allowed.rstrip("/")
            if not is_local(allowed) and (
                uri == beginning or uri.startswith((f"{beginning}/", f"{beginning}@"))
            ):
                if ".." in unquote(urlsplit(uri).path).split("/"):
                    break
                return
        raise AdapterError(f"{_origin(uri)} is not among the engine's adapter_sources")


@dataclass(slots=True)
class _Known:
    """What is known of a remote adapter."""

    signature: str | None = None
    checked_s: float = 0.0
    generation: int = 0
    checking: bool = False


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(LOCAL)


def local_directory(uri: str) -> Path:
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise AdapterError(f"{uri}: file:// cannot name a host")
    return Path(unquote(parts.path))


def local_version(uri: str) -> tuple[int, int, int, int]:
    """(mtime_ns, size) of both files: changes when the directory is published anew. Reads no contents.

    Raises `AdapterNotFoundError` when nothing is there, `AdapterError` when it is incomplete or a pickle.
    """
    directory = local_directory(uri)
    try:
        config, weights = (directory / CONFIG_FILE).stat(), (directory / WEIGHTS_FILE).stat()
    except (OSError, ValueError) as error:
        raise _why_absent(directory, uri) from error
    return config.st_mtime_ns, config.st_size, weights.st_mtime_ns, weights.st_size


def read_directory(uri: str, limits: Limits) -> dict[str, bytes]:
    """The files of a local directory, all of one version. Raises `AdapterError`."""
    directory = local_directory(uri)
    for _ in range(3):
        version = local_version(uri)
        check_size(WEIGHTS_FILE, version[3], limits)
        files = {name: _contents(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        if local_version(uri) == version:
            return files
    raise AdapterError(
        f"{WEIGHTS_FILE}: it changed again and again while it was read; publish it by a rename"
    )


def _side_files(directory: Path, limits: Limits) -> dict[str, bytes]:
    files = {}
    for name in SIDE_FILES:
        path = directory / name
        if path.is_file():
            check_size(name, path.stat().st_size, limits)
            files[name] = _contents(path)
    return files


def check_size(name: str, num_bytes: int, limits: Limits) -> None:
    """Raises `AdapterError` when a file is larger than it can be."""
    if num_bytes > limits.of(name):
        raise AdapterError(f"{name}: {num_bytes} bytes; at most {limits.of(name)} are possible for this base")


def token_for(host: str) -> str | None:
    """The bearer token for a web source: LORALAND_TOKEN_<HOST>, with _ for what is no letter or digit."""
    name = "".join(letter if letter.isalnum() else "_" for letter in host.upper())
    return os.environ.get(f"LORALAND_TOKEN_{name}")


def _origin(uri: str) -> str:
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.hostname or ''}"


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path.name}: cannot be read: {error.strerror}") from error


def _why_absent(directory: Path, uri: str) -> AdapterError:
    try:
        present = {path.name for path in directory.iterdir()}
    except (OSError, ValueError):
        return AdapterNotFoundError(f"no adapter directory at {uri!r}")
    if WEIGHTS_FILE not in present and PICKLE_FILE in present:
        return AdapterError(
            f"{directory / PICKLE_FILE}: a pickle, which is never read; save it as {WEIGHTS_FILE}"
        )
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in present]
    if len(missing) == 2:
        return AdapterNotFoundError(f"no adapter in {uri!r}: it has neither {CONFIG_FILE} nor {WEIGHTS_FILE}")
    return AdapterError(f"{directory}: {', '.join(missing) or 'a file'} is missing or cannot be read")
