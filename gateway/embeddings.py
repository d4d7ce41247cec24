"""`POST /v1/embeddings`: the engine's pooled hidden states in OpenAI's shape. Knows no tensors."""

import array
import asyncio
import base64
import sys
import time
import uuid

from litestar import Request, post
from litestar.types import ASGIApp

from engine.protocol import Generate, SamplingParams
from gateway.access_log import record_of
from gateway.completion import check_prompt_ids, tokens_left, truncated
from gateway.disconnect import while_connected
from gateway.errors import InternalError
from gateway.model_text import ModelText
from gateway.openai_request import check_embedding, decode
from gateway.openai_schema import Embedding, EmbeddingFields, Embeddings, EmbeddingUsage
from gateway.routes import find_model, json_answer, route
from gateway.served_model import ServedModel


@post("/v1/embeddings", status_code=200)
async def create_embeddings(request: Request) -> ASGIApp:
    """One vector of length 1 for each input."""
    return await route(request, "/embeddings", _own)


async def _own(request: Request, name: str | None) -> ASGIApp:
    fields = decode(await request.body(), EmbeddingFields)
    inputs = check_embedding(fields)
    model, adapter = find_model(request, name or fields.model, adapter_id=fields.adapter_id)
    text = await model.text_for(adapter)

    async def run() -> ASGIApp:
        request_id = f"embd-{uuid.uuid4().hex}"
        requests: list[Generate] = []
        for index, given in enumerate(inputs):
            requests.append(
                Generate(
                    f"{request_id}-{index}",
                    await _tokens(given, text, fields),
                    SamplingParams(max_tokens=1),
                    adapter,
                    priority=fields.priority or 0,
                    pooling=fields.pooling or "mean",
                )
            )
            await asyncio.sleep(0)  # a thousand inputs must not keep everyone else waiting
        record = record_of(request.scope)
        vectors = await _embed(model, requests, record.priority)
        record.first_token_s = time.perf_counter()
        record.prompt_tokens = tokens = sum(len(each.prompt) for each in requests)
        written = base64.b64encode if fields.encoding_format == "base64" else None
        data = [
            Embedding(index=index, embedding=written(vector).decode() if written else _floats(vector))
            for index, vector in enumerate(vectors)
        ]
        return json_answer(Embeddings(data=data, model=fields.model, usage=EmbeddingUsage(tokens, tokens)))

    return await while_connected(run(), request.receive)


async def _tokens(given: str | list[int], text: ModelText, fields: EmbeddingFields) -> list[int]:
    room = text.facts.max_model_len - 1
    if isinstance(given, str):
        given = await text.tokenizer.encode(given, add_special_tokens=fields.add_special_tokens is not False)
    else:
        check_prompt_ids(given, text.facts.vocab_size)
    tokens = truncated(given, fields.truncate_prompt_tokens, room)
    tokens_left(len(tokens), None, 1, text.facts.max_model_len, "input")
    return tokens


async def _embed(model: ServedModel, requests: list[Generate], priority: int) -> list[bytes]:
    """Each request's vector, as bytes of float32. Raises `GatewayError`."""
    vectors: dict[int, bytes] = {}
    generation = model.client.generate(requests, priority)
    try:
        while outputs := await generation.next():
            for index, output in outputs:
                if output.embedding is None:
                    raise InternalError("The engine of this model gives no embeddings.")
                vectors[index] = output.embedding
    finally:
        generation.close()
    return [vectors[index] for index in range(len(requests))]


def _floats(vector: bytes) -> list[float]:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
