"""Adapters in object stores and whatever else fsspec reads: `s3://bucket/prefix`, `gs://`, `az://`, ...

Credentials are the store library's own (for S3: AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance's role, ...).
"""

from typing import Any
from urllib.parse import urlsplit

import fsspec

from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE
from engine.sources import SIDE_FILES, Limits, RemoteSource, SourceUnreachableError, check_size

_CHUNK_BYTES = 2**22


class StoreSource(RemoteSource):
    """A directory (prefix) that holds the adapter's files."""

    def __init__(self, uri: str, limits: Limits) -> None:
        self._scheme, self._limits = urlsplit(uri).scheme, limits
        try:
            self._store, self._path = fsspec.url_to_fs(uri.rstrip("/"))
        except ImportError as error:
            raise AdapterError(f"{self._scheme}:// needs a package that is not installed: {error}") from error
        except (ValueError, OSError) as error:
            raise AdapterError(f"{self._scheme}:// cannot be used: {error}") from error

    def signature(self) -> str:
        seen = []
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            info = self._info(name)
            seen.append(
                [
                    str(info.get(key, ""))
                    for key in ("ETag", "etag", "LastModified", "mtime", "created", "size")
                ]
            )
        return repr(seen)

    def fetch(self) -> dict[str, bytes]:
        files = {name: self._read(name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        for name in SIDE_FILES:
            try:
                files[name] = self._read(name)
            except AdapterNotFoundError:
                continue
        return files

    def _info(self, name: str) -> dict[str, Any]:
        try:
            self._store.invalidate_cache()
            return self._store.info(f"{self._path}/{name}")
        except FileNotFoundError as error:
            raise AdapterNotFoundError(f"{name}: there is no such file in the store") from error
        except PermissionError as error:
            raise AdapterError(f"{name}: the store refuses access") from error
        except Exception as error:  # every store has errors of its own
            raise SourceUnreachableError(
                f"{name}: the store does not answer: {type(error).__name__}"
            ) from error

    def _read(self, name: str) -> bytes:
        check_size(name, int(self._info(name).get("size") or 0), self._limits)
        data = bytearray()
        try:
            with self._store.open(f"{self._path}/{name}", "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    data += chunk
                    check_size(name, len(data), self._limits)
        except AdapterError:
            raise
        except Exception as error:
            raise SourceUnreachableError(f"{name}: the store broke off: {type(error).__name__}") from error
        return bytes(data)
