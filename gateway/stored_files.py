"""Files: what the database says of them and what the file store holds. Knows no HTTP and no batch's insides."""

from collections.abc import AsyncGenerator, Callable
from time import time

import structlog
from sqlalchemy import ColumnElement, Select, delete, exists, or_, select

from gateway.errors import InvalidRequestError, StorageUnavailableError
from gateway.file_store import FileStore
from gateway.paging import PageWanted
from gateway.storage import Storage
from gateway.tables import OPEN, Batch, StoredFile

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class FileInUseError(InvalidRequestError):
    code = "file_in_use"


class StoredFiles:
    """Every method raises `StorageUnavailableError` when the database or the store is locked or gone."""

    def __init__(self, storage: Storage, store: FileStore, now: Callable[[], float] = time) -> None:
        self._storage = storage
        self._now = now
        self.store = store

    async def add(self, file: StoredFile) -> None:
        """List a file whose contents are in the store."""
        async with self._storage.writing() as session:
            session.add(file)

    async def get(self, file_id: str) -> StoredFile | None:
        async with self._storage.reading() as session:
            return await session.scalar(self._select().where(StoredFile.id == file_id))

    async def page(self, wanted: PageWanted, purpose: str | None = None) -> list[StoredFile]:
        query = self._select()
        if purpose is not None:
            query = query.where(StoredFile.purpose == purpose)
        async with self._storage.reading() as session:
            return list(await session.scalars(wanted.narrow(query, StoredFile.id)))

    def chunks(self, file: StoredFile) -> AsyncGenerator[bytes]:
        return self.store.chunks(file.id)

    async def delete(self, file_id: str) -> bool:
        """Whether it was there.

        Raises:
            FileInUseError: a batch still reads it.
        """
        async with self._storage.writing() as session:
            # The same row that a new batch locks: of the two, the later sees what the earlier did.
            file = await session.scalar(select(StoredFile).where(StoredFile.id == file_id).with_for_update())
            if file is None:
                return False
            if reader := await session.scalar(select(Batch.id).where(_reads(file_id))):
                raise FileInUseError(
                    f"The file is the input of {reader}, which is not finished. Cancel that batch first.",
                    param="file_id",
                )
            await session.delete(file)
        await self._forget(file_id)
        return True

    async def delete_expired(self) -> None:
        """Remove the files whose time has come, but none that a batch still reads."""
        async with self._storage.writing() as session:
            gone = list(
                await session.scalars(
                    delete(StoredFile)
                    .where(
                        StoredFile.expires_at <= self._now(),
                        ~exists().where(_reads(StoredFile.id.expression)),
                    )
                    .returning(StoredFile.id)
                )
            )
        for file_id in gone:
            await self._forget(file_id)

    async def _forget(self, file_id: str) -> None:
        """Remove contents that nothing names any more; what cannot be removed only takes room."""
        try:
            await self.store.delete(file_id)
        except StorageUnavailableError:
            log.warning("contents_left_behind", file_id=file_id)

    def _select(self) -> Select[StoredFile]:
        return select(StoredFile).where(
            or_(StoredFile.expires_at.is_(None), StoredFile.expires_at > self._now())
        )


def _reads(file_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    return (Batch.input_file_id == file_id) & Batch.status.in_(OPEN)
