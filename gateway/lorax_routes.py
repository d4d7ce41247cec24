"""`/generate` and `/generate_stream` for people who come from LoRAX. Knows no shapes."""

import time

import msgspec
from litestar import Request, post
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from gateway.access_log import record_of
from gateway.completion import tokens_left
from gateway.errors import GatewayError, InvalidRequestError, headers_of
from gateway.lorax_format import LoraxFields, LoraxWriter, completion_of, error_of
from gateway.openai_request import check_completion
from gateway.routes import Prepared, answer, find_model, job_of, models_of, prompt_of


@post("/generate", status_code=200)
async def generate(request: Request) -> ASGIApp:
    """One text, or with `stream` its tokens."""
    return await _answer(request, stream=None)


@post("/generate_stream", status_code=200)
async def generate_stream(request: Request) -> ASGIApp:
    """The tokens of one text as they come."""
    return await _answer(request, stream=True)


LORAX_ROUTES = [generate, generate_stream]


async def _answer(request: Request, stream: bool | None) -> ASGIApp:
    try:
        response = await _generate(request, stream)
    except GatewayError as error:
        record_of(request.scope).error = error.code
        status, body = error_of(error)
        return ASGIResponse(
            body=msgspec.json.encode(body),
            media_type="application/json",
            status_code=status,
            headers=headers_of(error),
        )
    if isinstance(response, ASGIResponse):
        for name, value in _timings(request).items():
            response.headers[name] = value
    return response


async def _generate(request: Request, stream: bool | None) -> ASGIApp:
    try:
        fields = msgspec.json.decode(await request.body(), type=LoraxFields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The request body cannot be read: {error}") from error
    asked = completion_of(fields, models_of(request).first.name)
    check_completion(asked)
    model, adapter = find_model(request, asked.model, adapter_id=asked.adapter_id)
    text = await model.text_for(adapter)

    async def prepare() -> Prepared:
        prompt = await prompt_of(fields.inputs, text, asked)
        length = len(prompt.token_ids)
        limit = tokens_left(length, asked.max_tokens, None, text.facts.max_model_len, "inputs")
        job = job_of("gen", asked, text, adapter, [prompt], [limit], logprobs=0)
        return model, job, LoraxWriter(job, fields, text.tokenizer.special_ids)

    return await answer(request, prepare, fields.stream if stream is None else stream)


def _timings(request: Request) -> dict[str, str]:
    """LoRAX's headers; times in whole milliseconds."""
    record, now = record_of(request.scope), time.perf_counter()
    total_ms = (now - record.started_s) * 1e3
    return {
        "x-total-time": str(round(total_ms)),
        "x-inference-time": str(round(total_ms)),
        "x-time-per-token": str(round(total_ms / max(1, record.completion_tokens))),
        "x-prompt-tokens": str(record.prompt_tokens),
        "x-generated-tokens": str(record.completion_tokens),
        "x-total-tokens": str(record.prompt_tokens + record.completion_tokens),
        "x-model-id": record.model.partition("/")[0],
    }
