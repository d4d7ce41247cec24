"""A request to a model that is not ours: the upstream's words under the client's names, what it used and what it cost.

Knows how an answer becomes a response; how to reach an upstream is `upstream.py`'s.
"""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from litestar import Request
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from gateway.access_log import CLIENT_GONE, RequestRecord, record_of
from gateway.config import GatewayConfig, UpstreamModelConfig
from gateway.disconnect import while_connected
from gateway.errors import GatewayError
from gateway.openai_response import error_event
from gateway.openai_schema import Model
from gateway.sse import EventStream
from gateway.upstream import Letter, StreamedAnswer, Upstream, WholeAnswer
from gateway.upstream_events import Fields, UpstreamUsage, Wording, renamed_in, usage_in

RESPONSES = "/responses"
EMBEDDINGS = "/embeddings"
COUNTED = ("/chat/completions", "/completions")
"""Where `stream_options.include_usage` is known."""


class Asked(msgspec.Struct, frozen=True):
    """As much of a request as routing needs."""

    model: str
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None


def asked_in(body: bytes) -> Asked | None:
    """None: the body is not one of OpenAI's; who checks requests will say in what."""
    try:
        return msgspec.json.decode(body, type=Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """One public name and the upstream behind it."""

    upstream: Upstream
    config: UpstreamModelConfig
    created: int

    @property
    def remote(self) -> str:
        return self.config.remote or self.config.name

    def cost_usd(self, usage: UpstreamUsage) -> float:
        config = self.config
        return (
            usage.read * config.input_usd_per_million + usage.written * config.output_usd_per_million
        ) / 1e6

    @property
    def has_price(self) -> bool:
        return self.config.input_usd_per_million > 0 or self.config.output_usd_per_million > 0

    def card(self) -> Model:
        return Model(
            id=self.config.name,
            created=self.created,
            owned_by=self.upstream.name,
            root=self.remote,
            parent=None,
            max_model_len=None,
        )


class RemoteModels:
    """Every upstream, and its models by public name."""

    def __init__(self, config: GatewayConfig, session: aiohttp.ClientSession) -> None:
        self.timeout_s = config.request_timeout_s
        self.upstreams = [Upstream(each, session) for each in config.upstreams]
        now = int(time.time())
        self._models = {
            model.name: RemoteModel(upstream, model, now)
            for upstream, each in zip(self.upstreams, config.upstreams, strict=True)
            for model in each.models
        }
        standing_for = {
            **config.aliases,
            **{name: "+".join(shares) for name, shares in config.splits.items()},
        }
        self._others = [
            Model(id=name, created=now, root=target, parent=None, max_model_len=None)
            for name, target in standing_for.items()
        ]

    def find(self, name: str) -> RemoteModel | None:
        return self._models.get(name)

    def cards(self) -> list[Model]:
        """The upstreams' models, the aliases and the splits."""
        return [*(model.card() for model in self._models.values()), *self._others]


async def relay(request: Request, path: str, model: RemoteModel, asked: Asked, deadline: float) -> ASGIApp:
    """Let an upstream answer; of a stream, wait for its beginning: until then an error is an HTTP error.

    Args:
        path: Of the endpoint, below `/v1`.
        deadline: When to give up, in the event loop's time.

    Raises:
        UpstreamError: it did not answer.
        ClientGoneError: nobody waits any more.
    """
    record = record_of(request.scope)
    record.model = model.config.name
    body, hides_usage = _letter_body(await request.body(), path, model, asked)
    letter = Letter(path, body, bool(asked.stream) and path != EMBEDDINGS, record.request_id, deadline)
    wording = Wording(asked.model if asked.model != model.remote else None, hides_usage)
    answer = await while_connected(model.upstream.send(letter, wording), request.receive)
    record.first_token_s = time.perf_counter()
    if isinstance(answer, WholeAnswer):
        _account(record, model, usage_in(answer.fields))
        renamed = renamed_in(answer.fields, wording.model)
        return ASGIResponse(
            body=answer.body if renamed is None else renamed, media_type="application/json", status_code=200
        )

    def close(left: bool) -> None:
        answer.close()
        if left:
            record.status = CLIENT_GONE
        _account(record, model, answer.said.usage)

    return EventStream(_events(answer, record, path), close)


async def _events(answer: StreamedAnswer, record: RequestRecord, path: str) -> AsyncGenerator[bytes]:
    """The bytes of a stream. A failure after its start can only be an event in it."""
    try:
        yield answer.first
        async for data in answer.rest:
            yield data
    except GatewayError as error:
        record.error = error.code
        yield _response_error_event(error) if path == RESPONSES else error_event(error)
    if answer.said.error is not None:
        record.error = answer.said.error.code or answer.said.error.type


def _letter_body(body: bytes, path: str, model: RemoteModel, asked: Asked) -> tuple[bytes, bool]:
    """The body for the upstream, byte for byte the client's where nothing must change; and whether token counts were
    asked for in it that the client did not ask for."""
    changes: dict[str, Any] = {}
    if asked.model != model.remote:
        changes["model"] = model.remote
    fields: Fields = msgspec.json.decode(body, type=Fields)
    hides_usage = False
    if asked.stream and path in COUNTED and model.has_price:
        options = msgspec.json.decode(fields.get("stream_options", b"null"))
        if options is None or (isinstance(options, dict) and not options.get("include_usage")):
            changes["stream_options"] = {**(options or {}), "include_usage": True}
            hides_usage = True
    return (msgspec.json.encode({**fields, **changes}) if changes else body), hides_usage


def _account(record: RequestRecord, model: RemoteModel, usage: UpstreamUsage | None) -> None:
    if usage is not None:
        record.prompt_tokens = usage.read
        record.cached_tokens = usage.cached
        record.completion_tokens = usage.written
        record.cost_usd = model.cost_usd(usage)


def _response_error_event(error: GatewayError) -> bytes:
    """The Responses API has its errors bare and numbered; the number is not looked at by SDKs."""
    data = {
        "type": "error",
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "sequence_number": 0,
    }
    return b"event: error\ndata: " + msgspec.json.encode(data) + b"\n\n"
