"""Batches in the database: every change of a batch's state, and who may make it. Knows no file and no model.

A gateway that works on a batch holds a lease on it and renews it. Whoever finds one that has run out takes the batch
over with all results that were saved. Every change by a worker first locks the batch's row and looks whether it still
holds the lease, so that one that was taken for dead cannot write beside its successor.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import time
from typing import Any

import msgspec
from sqlalchemy import delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from gateway.batch_input import Problem
from gateway.errors import GatewayError
from gateway.paging import PageWanted
from gateway.storage import Storage
from gateway.tables import CANCELLABLE, OPEN, Batch, BatchResult, BatchStatus, FilePurpose, StoredFile, new_id


class LeaseLostError(Exception):
    """Another gateway has the batch now, or it is gone."""


class NotCancellableError(GatewayError):
    status = 409
    type = "invalid_request_error"
    code = "batch_not_cancellable"


class LineResult(msgspec.Struct, frozen=True):
    """What came of one line."""

    line: int
    ok: bool
    payload: str
    """The line of the results or errors file, without its end."""


class StoredBatches:
    """Every method raises `StorageUnavailableError` when the database is locked or gone.

    Args:
        lease_s: How long a batch is left to a gateway that does not say anything of it.
    """

    def __init__(self, storage: Storage, lease_s: float, now: Callable[[], float] = time) -> None:
        self._storage = storage
        self._lease_s = lease_s
        self.now = now

    @property
    def exist(self) -> bool:
        """Whether there can be any."""
        return self._storage.exists

    # What clients do

    async def add(self, batch: Batch) -> bool:
        """Add a batch, unless its input file is not there or not meant for batches."""
        async with self._storage.writing() as session:
            file = await session.scalar(
                select(StoredFile)
                .where(
                    StoredFile.id == batch.input_file_id,
                    StoredFile.purpose == FilePurpose.BATCH.value,
                    or_(StoredFile.expires_at.is_(None), StoredFile.expires_at > self.now()),
                )
                .with_for_update()
            )
            if file is None:
                return False
            session.add(batch)
            return True

    async def get(self, batch_id: str) -> Batch | None:
        async with self._storage.reading() as session:
            return await session.get(Batch, batch_id)

    async def page(self, wanted: PageWanted) -> list[Batch]:
        async with self._storage.reading() as session:
            return list(await session.scalars(wanted.narrow(select(Batch), Batch.id)))

    async def cancel(self, batch_id: str) -> Batch | None:
        """Ask for an end; harmless when repeated. Raises `NotCancellableError` for a batch that has ended."""
        async with self._storage.writing() as session:
            batch = await session.scalar(select(Batch).where(Batch.id == batch_id).with_for_update())
            if batch is not None and batch.status in CANCELLABLE:
                batch.status = BatchStatus.CANCELLING.value
                batch.cancelling_at = int(self.now())
            elif batch is not None and batch.status != BatchStatus.CANCELLING:
                raise NotCancellableError(f"Cannot cancel a batch with status '{batch.status}'.")
            return batch

    # What a worker does

    async def claim(self, worker: str) -> Batch | None:
        """The oldest batch that nobody works on, now leased to `worker`; None if there is none."""
        if not self.exist:
            return None
        free = or_(Batch.worker.is_(None), Batch.lease_until < self.now())
        query = select(Batch).where(Batch.status.in_(OPEN), free).order_by(Batch.id).limit(1)
        async with self._storage.reading() as session:
            if await session.scalar(query) is None:
                return None
        async with self._storage.writing() as session:
            batch = await session.scalar(query.with_for_update(skip_locked=True))
            if batch is not None:
                batch.worker = worker
                batch.lease_until = self.now() + self._lease_s
            return batch

    async def renew(self, batch_id: str, worker: str) -> Batch:
        async with self._owned(batch_id, worker) as (_, batch):
            return batch

    async def release(self, batch_id: str, worker: str) -> None:
        """Let another gateway take the batch at once."""
        async with self._owned(batch_id, worker) as (_, batch):
            batch.worker = None

    async def fail(self, batch_id: str, worker: str, problems: Sequence[Problem]) -> Batch:
        """End a batch whose input cannot be used."""
        async with self._owned(batch_id, worker) as (_, batch):
            if batch.status == BatchStatus.VALIDATING:
                batch.status = BatchStatus.FAILED.value
                batch.failed_at = int(self.now())
                batch.errors = [msgspec.to_builtins(problem) for problem in problems]
                batch.worker = None
            return batch

    async def start(self, batch_id: str, worker: str, total: int) -> Batch:
        """Its input is good: so many requests are to be answered."""
        async with self._owned(batch_id, worker) as (_, batch):
            if batch.status == BatchStatus.VALIDATING:
                batch.status = BatchStatus.IN_PROGRESS.value
                batch.in_progress_at = int(self.now())
                batch.total = total
            return batch

    async def save(self, batch_id: str, worker: str, results: Sequence[LineResult]) -> None:
        """Keep results and count them, together.

        What is there already, because the answer to an earlier attempt was lost, stays and is not counted again.
        """
        async with self._owned(batch_id, worker) as (session, batch):
            lines = [result.line for result in results]
            there = set(
                await session.scalars(
                    select(BatchResult.line).where(
                        BatchResult.batch_id == batch_id, BatchResult.line.in_(lines)
                    )
                )
            )
            fresh = [result for result in results if result.line not in there]
            if not fresh:
                return
            rows: list[dict[str, Any]] = [
                {"batch_id": batch_id, "line": each.line, "ok": each.ok, "payload": each.payload}
                for each in fresh
            ]
            await session.execute(insert(BatchResult), rows)
            succeeded = sum(result.ok for result in fresh)
            batch.completed += succeeded
            batch.failed += len(fresh) - succeeded

    async def finalize(self, batch_id: str, worker: str) -> Batch:
        """No more is asked; the files get the names under which they are written, this time or the next."""
        async with self._owned(batch_id, worker) as (_, batch):
            if batch.status == BatchStatus.IN_PROGRESS:
                batch.status = BatchStatus.FINALIZING.value
            batch.finalizing_at = batch.finalizing_at or int(self.now())
            batch.output_file_id = batch.output_file_id or new_id("file-")
            batch.error_file_id = batch.error_file_id or new_id("file-")
            return batch

    async def finish(
        self, batch_id: str, worker: str, output: StoredFile | None, errors: StoredFile | None
    ) -> Batch:
        """End a batch: its files are listed and its results forgotten, all at once."""
        async with self._owned(batch_id, worker) as (session, batch):
            now = int(self.now())
            if batch.status == BatchStatus.CANCELLING:
                batch.status, batch.cancelled_at = BatchStatus.CANCELLED.value, now
            elif batch.completed + batch.failed < batch.total:
                batch.status, batch.expired_at = BatchStatus.EXPIRED.value, now
            else:
                batch.status, batch.completed_at = BatchStatus.COMPLETED.value, now
            batch.output_file_id = output.id if output else None
            batch.error_file_id = errors.id if errors else None
            batch.worker = None
            session.add_all(file for file in (output, errors) if file is not None)
            await session.execute(delete(BatchResult).where(BatchResult.batch_id == batch_id))
            return batch

    async def answered(self, batch_id: str, first_line: int, limit: int) -> list[int]:
        """Lines that have a result, in order, from `first_line` on."""
        query = select(BatchResult.line).where(
            BatchResult.batch_id == batch_id, BatchResult.line >= first_line
        )
        async with self._storage.reading() as session:
            return list(await session.scalars(query.order_by(BatchResult.line).limit(limit)))

    async def results(self, batch_id: str, first_line: int, limit: int, *, ok: bool) -> list[LineResult]:
        """Results of one kind, in order, from `first_line` on."""
        query = select(BatchResult.line, BatchResult.ok, BatchResult.payload).where(
            BatchResult.batch_id == batch_id, BatchResult.line >= first_line, BatchResult.ok.is_(ok)
        )
        async with self._storage.reading() as session:
            rows = await session.execute(query.order_by(BatchResult.line).limit(limit))
            return [LineResult(line, ok, payload) for line, ok, payload in rows]

    @asynccontextmanager
    async def _owned(self, batch_id: str, worker: str) -> AsyncIterator[tuple[AsyncSession, Batch]]:
        async with self._storage.writing() as session:
            batch = await session.scalar(
                select(Batch).where(Batch.id == batch_id, Batch.worker == worker).with_for_update()
            )
            if batch is None:
                raise LeaseLostError(batch_id)
            batch.lease_until = self.now() + self._lease_s
            yield session, batch
