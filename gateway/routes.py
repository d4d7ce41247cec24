"""The HTTP surface: which address does what. Decisions are made in the files it calls."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import structlog
from litestar import Request, get, post
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from engine.protocol import AdapterRef
from gateway.access_log import CLIENT_GONE, RequestRecord, record_of
from gateway.completion import (
    DEFAULT_COMPLETION_TOKENS,
    Completion,
    Job,
    Piece,
    Prompt,
    check_prompt_ids,
    requests_of,
    tokens_left,
    truncated,
)
from gateway.detokenizer import Detokenizer, detokenize
from gateway.disconnect import while_connected
from gateway.errors import GatewayError, InternalError, InvalidRequestError
from gateway.metrics import Metrics
from gateway.model_text import ModelText
from gateway.openai_request import (
    check_chat,
    check_chat_options,
    check_completion,
    check_messages,
    check_token_ids,
    decode,
    sampling_of,
    stops_of,
)
from gateway.openai_response import Answer, ChatWriter, CompletionWriter, Writer, usage_of
from gateway.openai_schema import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    GenerationFields,
    ModelList,
    Text,
    TokenizeFields,
    Tokens,
    WeightedAdapter,
)
from gateway.relay import RemoteModels, asked_in, relay
from gateway.routing import Names, another_may_do
from gateway.served_model import ServedModel, ServedModels
from gateway.sse import EventStream
from gateway.tools import ToolUse, check_format_beside_tools, read_tools, use_of, with_tools_in_words

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

LORAX_BASE = "__base_model__"
"""LoRAX's `adapter_id` for no adapter."""

Prepared = tuple[ServedModel, Job, Writer]


@get("/healthz")
async def healthz() -> ASGIApp:
    """Alive."""
    return json_answer({"status": "ok"})


@get("/readyz")
async def readyz(request: Request) -> ASGIApp:
    """Ready once an engine is connected: with several, one that is down must not take the others away."""
    engines = {
        model.name: "ready" if model.client.connected else "unavailable" for model in models_of(request)
    }
    ready = "ready" in engines.values() or not engines
    return json_answer(
        {"status": "ready" if ready else "unavailable", "models": engines}, 200 if ready else 503
    )


@get("/metrics")
async def metrics(request: Request) -> ASGIApp:
    """Prometheus."""
    metrics: Metrics = request.app.state.metrics
    for model in models_of(request):
        metrics.observe_engine(model.name, model.client.status)
    for upstream in _remote(request).upstreams:
        metrics.observe_upstream(upstream.name, upstream.failures, upstream.is_open)
    return ASGIResponse(body=metrics.text(), media_type="text/plain; version=0.0.4")


@get("/adapters")
async def adapters(request: Request) -> ASGIApp:
    """Where every adapter stands, for people and dashboards."""
    return json_answer(await models_of(request).adapters())


@get("/v1/models")
async def list_models(request: Request) -> ASGIApp:
    """Every base model, every adapter as `<base>/<task>`, and what the configuration names besides."""
    own = await asyncio.to_thread(models_of(request).cards)
    return json_answer(ModelList(data=[*own, *_remote(request).cards()]))


@get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request) -> ASGIApp:
    """One model; its id may hold slashes, encoded or not."""
    model_id = str(request.path_params["model_id"]).removeprefix("/")
    for card in _remote(request).cards():
        if card.id == model_id:
            return json_answer(card)
    return json_answer(await asyncio.to_thread(models_of(request).find_card, model_id))


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: Request) -> ASGIApp:
    """OpenAI's chat."""
    return await route(request, "/chat/completions", _chat)


async def _chat(request: Request, name: str | None) -> ASGIApp:
    fields = decode(await request.body(), ChatFields)
    messages = check_chat(fields)
    model, adapter = find_model(request, name or fields.model, fields.adapters, fields.adapter_id)
    text = await model.text_for(adapter)
    check_token_ids(fields, text.facts.vocab_size)

    tools = read_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    tool_use = use_of(tools, text, model.tool_format) if tools else None
    check_format_beside_tools(fields, tool_use)

    async def prepare() -> Prepared:
        wanted = fields.max_completion_tokens or fields.max_tokens
        token_ids = await encode_chat(text, messages, fields, tool_use)
        prompt = Prompt(
            truncated(token_ids, fields.truncate_prompt_tokens, text.facts.max_model_len - (wanted or 1))
        )
        limit = tokens_left(len(prompt.token_ids), wanted, None, text.facts.max_model_len, "messages")
        logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        job = job_of(
            "chatcmpl", fields, text, adapter, [prompt], [limit], logprobs=logprobs, tool_use=tool_use
        )
        writer = ChatWriter(
            job, logprobs=bool(fields.logprobs), include_usage=includes_usage(fields), tool_use=tool_use
        )
        return model, job, writer

    return await answer(request, prepare, bool(fields.stream))


@post("/v1/completions", status_code=200)
async def completions(request: Request) -> ASGIApp:
    """OpenAI's legacy completions."""
    return await route(request, "/completions", _complete)


async def _complete(request: Request, name: str | None) -> ASGIApp:
    fields = decode(await request.body(), CompletionFields)
    given = check_completion(fields)
    model, adapter = find_model(request, name or fields.model, fields.adapters, fields.adapter_id)
    text = await model.text_for(adapter)
    check_token_ids(fields, text.facts.vocab_size)

    async def prepare() -> Prepared:
        prompts: list[Prompt] = []
        limits: list[int] = []
        for each in given:
            prompt = await prompt_of(each, text, fields)
            length = len(prompt.token_ids)
            limits.append(
                tokens_left(
                    length, fields.max_tokens, DEFAULT_COMPLETION_TOKENS, text.facts.max_model_len, "prompt"
                )
            )
            prompts.append(prompt)
            await asyncio.sleep(0)  # a thousand prompts must not keep everyone else waiting
        job = job_of("cmpl", fields, text, adapter, prompts, limits, logprobs=fields.logprobs)
        writer = CompletionWriter(
            job, logprobs=fields.logprobs is not None, include_usage=includes_usage(fields)
        )
        return model, job, writer

    return await answer(request, prepare, bool(fields.stream))


@post("/tokenize", status_code=200)
async def tokenize(request: Request) -> ASGIApp:
    """Token ids of a prompt, or of messages under the chat template."""
    fields = decode(await request.body(), TokenizeFields)
    check_chat_options(fields)
    model, adapter = find_model(request, fields.model)
    text = await model.text_for(adapter)
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
    if fields.messages is not None:
        tokens = await encode_chat(text, check_messages(fields.messages), fields)
    else:
        tokens = await text.tokenizer.encode(
            fields.prompt or "", add_special_tokens=fields.add_special_tokens is not False
        )
    strings = [text.tokenizer.text_of(token) for token in tokens] if fields.return_token_strs else None
    return json_answer(Tokens(len(tokens), text.facts.max_model_len, tokens, strings))


@post("/detokenize", status_code=200)
async def detokenize_tokens(request: Request) -> ASGIApp:
    """The text of token ids, special tokens written out."""
    fields = decode(await request.body(), DetokenizeFields)
    model, adapter = find_model(request, fields.model)
    text = await model.text_for(adapter)
    check_prompt_ids(fields.tokens, text.facts.vocab_size)
    return json_answer(Text(detokenize(text.tokenizer, fields.tokens, keep_special=True)))


ROUTES = [
    healthz,
    readyz,
    metrics,
    adapters,
    list_models,
    retrieve_model,
    chat_completions,
    completions,
    tokenize,
    detokenize_tokens,
]


async def route(
    request: Request, path: str, own: Callable[[Request, str | None], Awaitable[ASGIApp]]
) -> ASGIApp:
    """Let the first model answer that can, of those that the request's name stands for.

    Args:
        own: Answers by an engine of ours, as the model of that name, or (None) as the one in the body.
    """
    names: Names = request.app.state.names
    asked = asked_in(await request.body())
    if asked is None or asked.model not in names:
        return await own(request, None)
    remote = _remote(request)
    record = record_of(request.scope)
    deadline = asyncio.get_running_loop().time() + remote.timeout_s
    first: tuple[GatewayError, str] | None = None
    for name in names.chain(asked.model, asked.user or asked.safety_identifier or record.request_id):
        try:
            if (model := remote.find(name)) is not None:
                return await relay(request, path, model, asked, deadline)
            return await own(request, name)
        except GatewayError as error:
            log.warning("model_failed", request_id=record.request_id, model=name, error=error.code)
            if first is None and not another_may_do(error):
                raise
            first = first or (error, record.model)
    assert first is not None
    error, record.model = first
    raise error


async def answer(request: Request, prepare: Callable[[], Awaitable[Prepared]], stream: bool) -> ASGIApp:
    """Run a request to its end, or, for a stream, to its first token: until then an error is an HTTP error."""
    record = record_of(request.scope)

    async def run() -> ASGIApp:
        model, job, writer = await prepare()
        generation = model.client.generate(job.requests, record.priority)
        completion = Completion(job, generation)
        streaming = False

        def close(left: bool = False) -> None:
            generation.close()
            if left:
                record.status = CLIENT_GONE
            record.prompt_tokens = completion.prompt_tokens
            record.cached_tokens = completion.cached_tokens
            record.completion_tokens = completion.completion_tokens

        try:
            pieces = completion.pieces()
            first = await anext(pieces)
            record.first_token_s = time.perf_counter()
            if stream:
                streaming = True
                return EventStream(_events(writer, completion, first, pieces, record), close)
            answers = [Answer() for _ in job.requests]
            _collect(answers, first)
            async for each in pieces:
                _collect(answers, each)
            body = writer.body(answers, usage_of(completion))
            await writer.keep(usage_of(completion))
            return json_bytes(body)
        finally:
            if not streaming:
                close()

    return await while_connected(run(), request.receive)


async def _events(
    writer: Writer,
    completion: Completion,
    first: list[Piece],
    pieces: AsyncIterator[list[Piece]],
    record: RequestRecord,
) -> AsyncGenerator[bytes]:
    """The bytes of a stream. A failure after its start can only be an event in it."""
    try:
        yield writer.opening() + b"".join(map(writer.events, first))
        async for each in pieces:
            if events := b"".join(map(writer.events, each)):
                yield events
        await writer.keep(usage_of(completion))
        yield writer.closing(usage_of(completion))
    except GatewayError as error:
        record.error = error.code
        yield writer.failure(error)
    except Exception:
        log.exception("stream_failed", request_id=record.request_id)
        record.error = InternalError.code
        yield writer.failure(InternalError("The server failed while working on this request."))


def _collect(answers: list[Answer], pieces: list[Piece]) -> None:
    for piece in pieces:
        answers[piece.index].add(piece)


async def encode_chat(
    text: ModelText,
    messages: list[dict[str, Any]],
    fields: ChatFields | TokenizeFields,
    tool_use: ToolUse | None = None,
) -> list[int]:
    shown = tool_use.tools if tool_use else None
    if shown is not None and tool_use and not tool_use.shows_tools:
        messages, shown = with_tools_in_words(messages, shown), None
    return await text.encode_chat(
        messages,
        tools=shown.definitions if shown else None,
        prompt_end=tool_use.prompt_end if tool_use else "",
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=bool(fields.continue_final_message),
        add_special_tokens=bool(fields.add_special_tokens),
        variables=fields.chat_template_kwargs,
    )


async def prompt_of(given: str | list[int], text: ModelText, fields: CompletionFields) -> Prompt:
    """One prompt of a completion, with what is needed to echo it."""
    tokenizer, echo, scores = text.tokenizer, bool(fields.echo), fields.logprobs is not None
    special = fields.add_special_tokens is not False
    room = text.facts.max_model_len - (
        DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    )
    if isinstance(given, str):
        token_ids = await tokenizer.encode(given, add_special_tokens=special)
        offsets = tokenizer.offsets(given, add_special_tokens=special) if echo and scores else None
        return Prompt(
            truncated(token_ids, fields.truncate_prompt_tokens, room), given if echo else None, offsets
        )
    check_prompt_ids(given, text.facts.vocab_size)
    if not echo:
        return Prompt(truncated(given, fields.truncate_prompt_tokens, room))
    detokenizer = Detokenizer(tokenizer, keep_special=True)
    written, offsets = "", []
    for token_id in given:
        offsets.append(len(written))
        written += detokenizer.feed([token_id])
    return Prompt(given, written + detokenizer.flush(), offsets if scores else None)


def job_of(
    prefix: str,
    fields: ChatFields | CompletionFields,
    text: ModelText,
    adapter: AdapterRef | None,
    prompts: list[Prompt],
    limits: list[int],
    *,
    logprobs: int | None,
    tool_use: ToolUse | None = None,
) -> Job:
    echo = prompts[0].echo is not None
    job_id = f"{prefix}-{uuid.uuid4().hex}"
    n = fields.n or 1
    sampling = sampling_of(fields, logprobs=logprobs, prompt_logprobs=logprobs if echo else None)
    forced = tool_use.grammar if tool_use else None
    if forced is not None:
        sampling = msgspec.structs.replace(sampling, grammar=forced)
    marker = text.tokenizer.id_of(tool_use.syntax.opening) if tool_use else None
    requests = requests_of(
        job_id,
        prompts,
        n,
        [max(1, limit) for limit in limits],
        sampling,
        fields.seed,
        adapter,
        priority=fields.priority or 0,
        cache_salt=fields.cache_salt or "",
        deadline_s=fields.deadline_s,
    )
    return Job(
        id=job_id,
        model_id=fields.model,
        created=int(time.time()),
        tokenizer=text.tokenizer,
        prompts=prompts,
        requests=requests,
        n=n,
        stops=stops_of(fields),
        continues=isinstance(fields, CompletionFields) or bool(fields.continue_final_message),
        keeps_special=fields.skip_special_tokens is False,
        keeps_stop=bool(fields.include_stop_str_in_output),
        discards_output=limits[0] == 0,
        shown_special=frozenset() if marker is None else frozenset({marker}),
        grammar_param="response_format" if forced is None else "tools",
    )


def includes_usage(fields: GenerationFields) -> bool:
    return bool(fields.stream_options and fields.stream_options.include_usage)


def _remote(request: Request) -> RemoteModels:
    return request.app.state.remote


def models_of(request: Request) -> ServedModels:
    return request.app.state.models


def find_model(
    request: Request,
    model_id: str | None,
    merged: list[WeightedAdapter] | None = None,
    adapter_id: str | None = None,
) -> tuple[ServedModel, AdapterRef | None]:
    """The model and adapter that a request names; without a name the first base. Raises `GatewayError`."""
    models = models_of(request)
    if model_id is None:
        model_id = models.first.name
    model, adapter = models.find(model_id)
    if merged:
        adapter = model.merged(model_id, merged)
    if adapter_id not in (None, "", LORAX_BASE):
        if adapter is not None:
            raise InvalidRequestError(
                f"'adapter_id' picks an adapter of a base: give 'model' as '{model.name}', and no 'adapters'.",
                param="adapter_id",
            )
        model_id = f"{model.name}/{adapter_id.removeprefix(f'{model.name}/')}"
        model, adapter = models.find(model_id, "adapter_id")
    record_of(request.scope).model = model_id
    return model, adapter


def json_answer(value: msgspec.Struct | dict, status: int = 200) -> ASGIApp:
    return json_bytes(msgspec.json.encode(value), status)


def json_bytes(body: bytes, status: int = 200) -> ASGIApp:
    return ASGIResponse(body=body, media_type="application/json", status_code=status)
