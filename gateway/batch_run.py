"""One batch on its way: check its input, have every line answered, write its files. Knows no HTTP and no model.

Every answer is saved before the next line takes its place, several at a time; what was saved is never asked again. So a
batch goes on where it was, whoever takes it up, and a line is in its files once.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from itertools import islice

import msgspec
import structlog

from gateway.batch_input import BatchLine, Checked, StoppedError, check_input, parse_line, read_lines
from gateway.errors import (
    InternalError,
    StorageUnavailableError,
    UnsupportedParameterError,
    envelope,
)
from gateway.inner_request import InnerAnswer
from gateway.stored_batches import LineResult, StoredBatches
from gateway.stored_files import StoredFiles
from gateway.tables import Batch, BatchStatus, FilePurpose, StoredFile

BLOCK_LINES = 64
PAGE_LINES = 500
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
MAX_ATTEMPTS = 3
"""Where trying again may not help."""
FLUSH_S = 5.0
"""How long answers that are not saved may hold up the end of the program."""

Ask = Callable[[str, bytes, str], Awaitable[InnerAnswer]]
"""(address, body, id of the request) -> answer"""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Streams(msgspec.Struct):
    stream: bool | None = None
    deadline_s: float | None = None


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw | str


class _Error(msgspec.Struct):
    code: str
    message: str


class _OutputLine(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


class BatchRun:
    """A batch in the hands of `worker`, who has claimed it.

    Args:
        slots: How many requests the gateway's batches may have under way together.
        concurrency: How many lines of this one.
        lease_s: How long the claim holds unless it is renewed.
    """

    def __init__(
        self,
        batch: Batch,
        worker: str,
        ask: Ask,
        batches: StoredBatches,
        files: StoredFiles,
        slots: asyncio.Semaphore,
        *,
        concurrency: int,
        lease_s: float,
        max_line_bytes: int,
    ) -> None:
        self._batch = batch
        self._worker = worker
        self._ask = ask
        self._batches = batches
        self._files = files
        self._slots = slots
        self._places = asyncio.Semaphore(concurrency)
        self._lease_s = lease_s
        self._max_line_bytes = max_line_bytes
        self._stop = asyncio.Event()
        self._stop_checking = threading.Event()
        self._unsaved: list[LineResult] = []
        self._saving = asyncio.Lock()

    def stop(self) -> None:
        """The client has cancelled the batch."""
        self._stop.set()
        self._stop_checking.set()

    async def run(self) -> None:
        """Work until the batch has ended. Cancelling it leaves the batch to whoever claims it next.

        Raises:
            LeaseLostError: somebody else has the batch.
            StorageUnavailableError: the database or the files are gone; what was saved is safe.
        """
        work = asyncio.create_task(self._advance())
        keeper = asyncio.create_task(self._keep_lease())
        try:
            await asyncio.wait({work, keeper}, return_when=asyncio.FIRST_COMPLETED)
            (work if work.done() else keeper).result()
        finally:
            self._stop_checking.set()
            work.cancel()
            keeper.cancel()
            await asyncio.gather(work, keeper, return_exceptions=True)

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            with suppress(StorageUnavailableError):
                batch = await self._batches.renew(self._batch.id, self._worker)
                if batch.status == BatchStatus.CANCELLING:
                    self.stop()

    async def _advance(self) -> None:
        batch = self._batch
        if batch.status == BatchStatus.VALIDATING:
            batch = await self._validate()
        if batch.status == BatchStatus.FAILED:
            return
        if batch.status == BatchStatus.IN_PROGRESS:
            await self._answer_all(batch)
        await self._write_files()

    # The input

    async def _validate(self) -> Batch:
        try:
            checked = await asyncio.to_thread(self._check)
        except StoppedError:
            return await self._batches.renew(self._batch.id, self._worker)
        if checked.problems:
            return await self._batches.fail(self._batch.id, self._worker, checked.problems)
        return await self._batches.start(self._batch.id, self._worker, checked.lines)

    def _check(self) -> Checked:
        with self._files.store.open(self._batch.input_file_id) as file:
            return check_input(file, self._batch.endpoint, self._max_line_bytes, self._stop_checking)

    async def _unanswered(self) -> AsyncGenerator[tuple[int, BatchLine]]:
        """The lines that have no result yet."""
        file = await asyncio.to_thread(self._files.store.open, self._batch.input_file_id)
        try:
            lines = read_lines(file, self._max_line_bytes)
            answered: set[int] = set()
            looked_up_to: float = 0  # what is known of which lines are answered
            while block := await asyncio.to_thread(_take, lines):
                for number, text in block:
                    if number > looked_up_to:
                        page = await self._batches.answered(self._batch.id, number, PAGE_LINES)
                        answered = set(page)
                        looked_up_to = page[-1] if len(page) == PAGE_LINES else float("inf")
                    if number not in answered:
                        yield number, parse_line(text)
        finally:
            file.close()

    # The answers

    async def _answer_all(self, batch: Batch) -> None:
        """Until every line has its result, the time is over, or the client has cancelled."""
        time_left_s = batch.expires_at - self._batches.now()
        if time_left_s > 0:
            feeding = asyncio.create_task(self._feed())
            stopping = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait(
                    {feeding, stopping}, timeout=time_left_s, return_when=asyncio.FIRST_COMPLETED
                )
                if feeding.done():
                    feeding.result()
            finally:
                feeding.cancel()
                stopping.cancel()
                await asyncio.gather(feeding, stopping, return_exceptions=True)
                with suppress(TimeoutError):
                    async with asyncio.timeout(FLUSH_S):
                        await self._save()
        await self._save()

    async def _feed(self) -> None:
        try:
            async with asyncio.TaskGroup() as asking, aclosing(self._unanswered()) as lines:
                async for number, line in lines:
                    await self._places.acquire()
                    asking.create_task(self._take_place(number, line))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _take_place(self, number: int, line: BatchLine) -> None:
        try:
            result = await self._answer(number, line)
            self._unsaved.append(result)
            await self._save()
        finally:
            self._places.release()

    async def _save(self) -> None:
        """Save all there is to save; those who wait meanwhile find theirs saved with the next."""
        async with self._saving:
            if not self._unsaved:
                return
            results, self._unsaved = self._unsaved, []
            backoff_s = FIRST_BACKOFF_S
            try:
                while results:
                    try:
                        await self._batches.save(self._batch.id, self._worker, results)
                        results = []
                    except StorageUnavailableError:
                        await asyncio.sleep(backoff_s)
                        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            finally:
                self._unsaved = results + self._unsaved

    async def _answer(self, number: int, line: BatchLine) -> LineResult:
        request_id = f"batch_req_{self._batch.id.removeprefix('batch_')}_{number}"
        options = _options(line)
        if options.stream:
            refusal = UnsupportedParameterError("'stream' is not supported in a batch.", param="stream")
            answer = InnerAnswer(refusal.status, body=msgspec.json.encode(envelope(refusal)))
        else:
            answer = await self._try(line, request_id, patient=options.deadline_s is None)
        response = _Response(answer.status, request_id, _embedded(answer.body))
        output = _OutputLine(request_id, line.custom_id, response, None)
        return LineResult(number, answer.status == 200, msgspec.json.encode(output).decode(errors="replace"))

    async def _try(self, line: BatchLine, request_id: str, *, patient: bool) -> InnerAnswer:
        """An answer, or the error that trying again does not help against; what is busy or away is waited for."""
        backoff_s = FIRST_BACKOFF_S
        attempts = 0
        while True:
            async with self._slots:
                try:
                    answer = await self._ask(line.url, bytes(line.body), request_id)
                except Exception:
                    log.exception("batch_line_failed", request_id=request_id)
                    error = InternalError("The server failed while working on this request.")
                    answer = InnerAnswer(error.status, body=msgspec.json.encode(envelope(error)))
            attempts += 1
            match answer.status:
                case 429 | 503:
                    pass
                case 500 | 504 if attempts < MAX_ATTEMPTS and (patient or answer.status == 500):
                    pass
                case _:
                    return answer
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    # The files

    async def _write_files(self) -> None:
        batch = await self._batches.finalize(self._batch.id, self._worker)
        answered = batch.completed + batch.failed
        expired = batch.status == BatchStatus.FINALIZING and answered < batch.total
        output = errors = None
        if batch.completed:
            output = await self._write(batch, batch.output_file_id, "output", self._saved(ok=True))
        if batch.failed or expired:
            errors = await self._write(batch, batch.error_file_id, "error", self._errors(expired))
        ended = await self._batches.finish(batch.id, self._worker, output, errors)
        log.info(
            "batch_ended",
            batch=batch.id,
            status=ended.status,
            total=batch.total,
            completed=batch.completed,
            failed=batch.failed,
        )

    async def _write(
        self, batch: Batch, file_id: str | None, name: str, lines: AsyncGenerator[str]
    ) -> StoredFile:
        assert file_id is not None
        async with self._files.store.writing(file_id) as writer, aclosing(lines):
            async for line in lines:
                await writer.write(line.encode() + b"\n")
        now = int(self._batches.now())
        life_s = batch.output_expires_after_s
        return StoredFile(
            id=file_id,
            filename=f"{batch.id}_{name}.jsonl",
            purpose=FilePurpose.BATCH_OUTPUT.value,
            bytes=writer.size,
            created_at=now,
            expires_at=None if life_s is None else now + life_s,
        )

    async def _saved(self, *, ok: bool) -> AsyncGenerator[str]:
        line = 0
        while page := await self._batches.results(self._batch.id, line + 1, PAGE_LINES, ok=ok):
            for result in page:
                yield result.payload
            line = page[-1].line

    async def _errors(self, expired: bool) -> AsyncGenerator[str]:
        async with aclosing(self._saved(ok=False)) as failed:
            async for payload in failed:
                yield payload
        if not expired:
            return
        error = _Error(
            "batch_expired",
            "This request could not be executed before the completion window expired.",
        )
        async with aclosing(self._unanswered()) as lines:
            async for number, line in lines:
                request_id = f"batch_req_{self._batch.id.removeprefix('batch_')}_{number}"
                yield msgspec.json.encode(_OutputLine(request_id, line.custom_id, None, error)).decode()


def _take(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return list(islice(lines, BLOCK_LINES))


def _options(line: BatchLine) -> _Streams:
    """What of the body matters here; a body that is wrong is told so by whoever answers it."""
    try:
        return msgspec.json.decode(line.body, type=_Streams)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Streams()


def _embedded(body: bytes) -> msgspec.Raw | str:
    """A body as part of a line: JSON as it is, on one line; anything else as a string."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="replace")
    return msgspec.Raw(msgspec.json.encode(document) if b"\n" in body else body)
