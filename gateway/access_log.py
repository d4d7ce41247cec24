"""Around every HTTP request: its id, one log line, its metrics. Never sees a body."""

import re
import time
import uuid
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import structlog
from litestar.datastructures import MutableScopeHeaders
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from gateway.metrics import Metrics

CLIENT_GONE = 499
"""The status of a request whose client left before the end, as nginx has it."""
SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
ENDPOINTS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/files",
        "/v1/batches",
        "/v1/models",
        "/generate",
        "/generate_stream",
        "/tokenize",
        "/detokenize",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(slots=True)
class RequestRecord:
    """What the handler of a request has to tell about it; times from `time.perf_counter`."""

    request_id: str
    started_s: float
    status: int | None = None
    model: str = ""
    """The one that answers, neither alias nor split; set once it is known to exist."""
    error: str | None = None
    first_token_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    priority: int = 0
    """Added to what the request asks for. Not 0 for the gateway's own requests, for whose answers nobody waits."""


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request being served."""
    return scope["state"]["record"]  # pyright: ignore[reportGeneralTypeIssues]


class AccessLog:
    """ASGI middleware outside the web framework, so that no response misses it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})  # pyright: ignore
        record = RequestRecord(_request_id(scope), time.perf_counter(), priority=state.get("priority", 0))
        state["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableScopeHeaders.from_message(message)
                headers["x-request-id"] = record.request_id
                if record.model:
                    headers["x-loraland-model"] = quote(record.model, safe="/:@+,*")
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._metrics.in_flight.dec()
            self._finish(scope, record)

    def _finish(self, scope: Scope, record: RequestRecord) -> None:
        path, method = scope["path"], str(scope.get("method"))
        if path in QUIET:
            return
        seconds = time.perf_counter() - record.started_s
        status = record.status or CLIENT_GONE
        background = record.priority != 0
        endpoint = "batch" if background else path if path in ENDPOINTS else "other"
        metrics, model = self._metrics, record.model
        metrics.requests.labels(model, endpoint, str(status)).inc()
        ttft_s = None
        if model:
            if not background:
                metrics.request_seconds.labels(model).observe(seconds)
            metrics.prompt_tokens.labels(model).inc(record.prompt_tokens)
            metrics.cached_tokens.labels(model).inc(record.cached_tokens)
            metrics.completion_tokens.labels(model).inc(record.completion_tokens)
            if record.cost_usd:
                metrics.cost_usd.labels(model).inc(record.cost_usd)
            if record.first_token_s is not None:
                ttft_s = record.first_token_s - record.started_s
                if not background:
                    metrics.first_token_seconds.labels(model).observe(ttft_s)
        (log.debug if background else log.info)(
            "request",
            request_id=record.request_id,
            method=method,
            path=path,
            status=status,
            model=model or None,
            error=record.error,
            seconds=round(seconds, 4),
            ttft_s=None if ttft_s is None else round(ttft_s, 4),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=record.completion_tokens,
            cost_usd=round(record.cost_usd, 8),
        )


def _request_id(scope: Scope) -> str:
    """The caller's `x-request-id` where it has a harmless one, so that a proxy's logs and ours meet."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SAFE_ID.fullmatch(value):
            return value.decode()
    return f"req_{uuid.uuid4().hex}"
