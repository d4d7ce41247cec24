"""`/v1/batches` as OpenAI has it: create, list, look at, cancel. The work is done in `batch_worker.py`."""

import time

import msgspec
from litestar import Request, get, post
from litestar.types import ASGIApp

from gateway.batch_worker import BatchWorker
from gateway.errors import GatewayError, InvalidRequestError
from gateway.files import NoSuchFileError
from gateway.openai_request import decode
from gateway.openai_schema import BatchFields
from gateway.paging import page_of, page_wanted
from gateway.routes import json_answer
from gateway.stored_batches import StoredBatches
from gateway.tables import OPEN, Batch, new_id
from gateway.upload import check_life_s

BATCH_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WINDOW, WINDOW_S = "24h", 86_400
MOST_BATCHES, DEFAULT_BATCHES = 100, 20
"""On a page."""
MOST_LABELS, LONGEST_KEY, LONGEST_LABEL = 16, 64, 512
"""Of `metadata`."""


class NoSuchBatchError(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "batch_not_found"


class BatchErrors(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[dict]


class RequestCounts(msgspec.Struct, frozen=True):
    total: int
    completed: int
    failed: int


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


@post("/v1/batches", status_code=200)
async def create_batch(request: Request) -> ASGIApp:
    """Take a batch; what is wrong with its lines shows in its status."""
    fields = decode(await request.body(), BatchFields)
    _check(fields)
    now = int(time.time())
    expiry = fields.output_expires_after
    batch = Batch(
        id=new_id("batch_"),
        endpoint=fields.endpoint,
        input_file_id=fields.input_file_id,
        completion_window=fields.completion_window,
        labels=fields.metadata,
        output_expires_after_s=expiry.seconds if expiry else None,
        created_at=now,
        expires_at=now + WINDOW_S,
    )
    shown = _shown(batch)
    if not await _batches(request).add(batch):
        raise NoSuchFileError(fields.input_file_id, "input_file_id")
    _worker(request).wake()
    return json_answer(shown)


@get("/v1/batches")
async def list_batches(request: Request) -> ASGIApp:
    """A page of the batches, latest first."""
    wanted = page_wanted(request, default=DEFAULT_BATCHES, most=MOST_BATCHES)
    found = await _batches(request).page(wanted)
    return json_answer(page_of([_shown(batch) for batch in found], wanted))


@get("/v1/batches/{batch_id:str}")
async def retrieve_batch(request: Request) -> ASGIApp:
    """How far one batch has come."""
    batch_id = str(request.path_params["batch_id"])
    batch = await _batches(request).get(batch_id)
    if batch is None:
        raise _no_such(batch_id)
    return json_answer(_shown(batch))


@post("/v1/batches/{batch_id:str}/cancel", status_code=200)
async def cancel_batch(request: Request) -> ASGIApp:
    """Stop a batch; what it has answered by then is in its files."""
    batch_id = str(request.path_params["batch_id"])
    batch = await _batches(request).cancel(batch_id)
    if batch is None:
        raise _no_such(batch_id)
    _worker(request).cancel(batch_id)
    return json_answer(_shown(batch))


BATCH_ROUTES = [create_batch, list_batches, retrieve_batch, cancel_batch]


def _check(fields: BatchFields) -> None:
    if fields.endpoint not in BATCH_ENDPOINTS:
        raise InvalidRequestError(
            f"Invalid 'endpoint': {fields.endpoint[:100]!r} is not one of {', '.join(BATCH_ENDPOINTS)}.",
            param="endpoint",
            code="invalid_value",
        )
    if fields.completion_window != WINDOW:
        raise InvalidRequestError(
            f"Invalid 'completion_window': only '{WINDOW}' is supported.",
            param="completion_window",
            code="invalid_value",
        )
    labels = fields.metadata or {}
    if len(labels) > MOST_LABELS or any(
        len(key) > LONGEST_KEY or len(label) > LONGEST_LABEL for key, label in labels.items()
    ):
        raise InvalidRequestError(
            f"Invalid 'metadata': at most {MOST_LABELS} pairs of a key of {LONGEST_KEY} and a value of "
            f"{LONGEST_LABEL} characters.",
            param="metadata",
        )
    if fields.output_expires_after is not None:
        check_life_s(fields.output_expires_after.seconds, "output_expires_after")


def _no_such(batch_id: str) -> NoSuchBatchError:
    return NoSuchBatchError(f"No batch found with id '{batch_id[:100]}'.", param="batch_id")


def _batches(request: Request) -> StoredBatches:
    return request.app.state.batches


def _worker(request: Request) -> BatchWorker:
    return request.app.state.batch_worker


def _shown(batch: Batch) -> BatchObject:
    ended = batch.status not in OPEN
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrors(data=batch.errors) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id if ended else None,
        error_file_id=batch.error_file_id if ended else None,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=RequestCounts(batch.total, batch.completed, batch.failed),
        metadata=batch.labels,
    )
