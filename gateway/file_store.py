"""The contents of files, by id, in a directory or wherever fsspec can write. Knows neither names nor purposes.

Whoever lists a file in the database does so after its contents are complete: what lies here without being listed was
left by an upload that broke off.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, BinaryIO, cast

import fsspec
import structlog
from fsspec.implementations.local import LocalFileSystem

from gateway.errors import StorageUnavailableError

CHUNK_BYTES = 2**20
RETRY_AFTER_S = 2.0

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class FileWriter:
    """Contents being written; in memory is one chunk of them."""

    def __init__(self, filesystem: Any, path: str, handle: Any) -> None:
        self.size = 0
        """In bytes."""
        self._filesystem = filesystem
        self._path = path
        self._handle = handle
        self._buffer = bytearray()
        self._turn = threading.Lock()

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        self._buffer += data
        if len(self._buffer) >= CHUNK_BYTES:
            await self._flush()

    async def finish(self) -> None:
        await self._flush()
        with _reported():
            await asyncio.to_thread(self._close)

    async def discard(self) -> None:
        await asyncio.shield(asyncio.to_thread(self._remove))

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        with _reported():
            await asyncio.to_thread(self._put, data)

    def _put(self, data: bytearray) -> None:
        with self._turn:
            self._handle.write(data)

    def _close(self) -> None:
        with self._turn:
            if isinstance(self._filesystem, LocalFileSystem):
                self._handle.flush()
                os.fsync(self._handle.fileno())
            self._handle.close()

    def _remove(self) -> None:
        with self._turn, suppress(OSError):
            self._handle.close()
            self._filesystem.rm_file(self._path)


class FileStore:
    """Every method raises `StorageUnavailableError` when the place cannot be read or written.

    Args:
        place: A directory, made when it is first needed, or a URL such as `s3://bucket/path`.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    @asynccontextmanager
    async def writing(self, file_id: str) -> AsyncIterator[FileWriter]:
        """Contents that are complete once the block has ended, and gone when it raises."""
        with _reported():
            writer = await asyncio.to_thread(self._create, file_id)
        try:
            yield writer
            await writer.finish()
        except BaseException:
            await writer.discard()
            raise

    def open(self, file_id: str) -> BinaryIO:
        """For reading, in a thread."""
        with _reported():
            filesystem, path = self._locate(file_id)
            return cast(BinaryIO, filesystem.open(path, "rb"))

    async def chunks(self, file_id: str) -> AsyncGenerator[bytes]:
        """The contents in parts of at most `CHUNK_BYTES`."""
        handle = await asyncio.to_thread(self.open, file_id)
        try:
            with _reported():
                while data := await asyncio.to_thread(handle.read, CHUNK_BYTES):
                    yield data
        finally:
            handle.close()

    async def delete(self, file_id: str) -> None:
        """Harmless when it is not there."""
        with _reported():
            await asyncio.to_thread(self._delete, file_id)

    def _create(self, file_id: str) -> FileWriter:
        filesystem, path = self._locate(file_id)
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        return FileWriter(filesystem, path, filesystem.open(path, "wb"))

    def _delete(self, file_id: str) -> None:
        filesystem, path = self._locate(file_id)
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)

    def _locate(self, file_id: str) -> tuple[Any, str]:
        filesystem, root = fsspec.url_to_fs(self._place)
        return filesystem, f"{root.rstrip('/')}/{file_id}"


@contextmanager
def _reported() -> Iterator[None]:
    """A failing store as what the caller is told; the reason, which may name places, is for the log."""
    try:
        yield
    except (OSError, ImportError) as error:
        log.warning("file_store_unavailable", reason=f"{type(error).__name__}: {error}")
        raise StorageUnavailableError(
            "The file storage of this server is not available at the moment: please try again.",
            retry_after_s=RETRY_AFTER_S,
        ) from error
