"""Takes up batches that nobody works on, several at a time, and clears away what has expired. Knows no line of them."""

import asyncio
import time
from contextlib import suppress

import structlog

from gateway.batch_run import Ask, BatchRun
from gateway.errors import StorageUnavailableError
from gateway.stored_batches import LeaseLostError, StoredBatches
from gateway.stored_files import StoredFiles
from gateway.stored_responses import StoredResponses
from gateway.tables import Batch, new_id

MAX_BATCHES = 8
"""At a time; they share the slots."""
POLL_S = 5.0
"""How often to look for batches that others left."""
SWEEP_S = 60.0

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BatchWorker:
    """One for each gateway process.

    Args:
        ask: Has one request answered, behind all others.
        concurrency: How many requests of batches may be under way together.
        lease_s: How long a batch is left to a gateway that does not say anything of it.
    """

    def __init__(
        self,
        ask: Ask,
        batches: StoredBatches,
        files: StoredFiles,
        responses: StoredResponses,
        *,
        concurrency: int,
        lease_s: float,
        max_line_bytes: int,
    ) -> None:
        self._ask = ask
        self._batches = batches
        self._files = files
        self._responses = responses
        self._concurrency = concurrency
        self._lease_s = lease_s
        self._max_line_bytes = max_line_bytes
        self._name = new_id("worker-")
        self._slots = asyncio.Semaphore(concurrency)
        self._wake = asyncio.Event()
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._swept_s = 0.0

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    def cancel(self, batch_id: str) -> None:
        """A batch was cancelled. If another gateway has it, that one finds out with its next renewal."""
        if (run := self._runs.get(batch_id)) is not None:
            run.stop()
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. What is under way then is free for others at once."""
        try:
            while True:
                self._wake.clear()
                with suppress(StorageUnavailableError):  # it is in the log; the next round may find it back
                    await self._take_up()
                    await self._sweep()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), min(POLL_S, self._lease_s))
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _take_up(self) -> None:
        while len(self._tasks) < MAX_BATCHES and (batch := await self._batches.claim(self._name)) is not None:
            run = self._runs[batch.id] = BatchRun(
                batch,
                self._name,
                self._ask,
                self._batches,
                self._files,
                self._slots,
                concurrency=self._concurrency,
                lease_s=self._lease_s,
                max_line_bytes=self._max_line_bytes,
            )
            self._tasks[batch.id] = asyncio.create_task(self._work(run, batch))

    async def _work(self, run: BatchRun, batch: Batch) -> None:
        """To the end, or until something is in the way: then the lease runs out, and somebody tries again."""
        log.info("batch_taken_up", batch=batch.id, status=batch.status)
        try:
            await run.run()
        except asyncio.CancelledError:
            with suppress(StorageUnavailableError, LeaseLostError):
                await self._batches.release(batch.id, self._name)
            raise
        except LeaseLostError:
            log.warning("batch_lost", batch=batch.id)
        except StorageUnavailableError:
            log.warning("batch_interrupted", batch=batch.id)
        except Exception:
            log.exception("batch_interrupted", batch=batch.id)
        finally:
            del self._runs[batch.id], self._tasks[batch.id]
            self._wake.set()

    async def _sweep(self) -> None:
        if not self._batches.exist or time.monotonic() - self._swept_s < SWEEP_S:
            return
        self._swept_s = time.monotonic()
        await self._files.delete_expired()
        await self._responses.delete_expired()
