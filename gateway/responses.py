"""The Responses API: which address does what. Knows no events and no shapes of items."""

from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from litestar import Request, delete, get, post
from litestar.types import ASGIApp

from gateway.completion import Prompt, tokens_left
from gateway.errors import InvalidRequestError, NotFoundError
from gateway.openai_request import check_chat_ranges, check_token_ids, decode
from gateway.responses_events import ResponsesWriter
from gateway.responses_request import (
    chat_of,
    in_responses_words,
    input_items_of,
    messages_of,
    replayed,
)
from gateway.responses_schema import DeletedResponse, ItemList, Response, ResponseFields
from gateway.routes import Prepared, answer, encode_chat, find_model, job_of, json_answer, json_bytes, route
from gateway.stored_responses import MAX_CHAIN, KeptResponse, StoredResponses
from gateway.tools import check_format_beside_tools, read_tools, use_of

KEPT_S = 30 * 24 * 3600
"""How long a response is kept, as OpenAI does."""
MAX_PAGE = 100


@post("/v1/responses", status_code=200)
async def create(request: Request) -> ASGIApp:
    """Answers input, or goes on from an earlier response."""
    return await route(request, "/responses", _create)


async def _create(request: Request, name: str | None) -> ASGIApp:
    fields = decode(await request.body(), ResponseFields)
    with in_responses_words():
        chat = chat_of(fields)
        check_chat_ranges(chat)
    items = input_items_of(fields.input)
    earlier = await _conversation(_store(request), fields.previous_response_id)
    messages = messages_of(fields.instructions, earlier, items)
    model, adapter = find_model(request, name or fields.model, fields.adapters)
    text = await model.text_for(adapter)
    check_token_ids(chat, text.facts.vocab_size)
    with in_responses_words():
        tools = read_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
        tool_use = use_of(tools, text, model.tool_format) if tools else None
        check_format_beside_tools(chat, tool_use)

    async def prepare() -> Prepared:
        with in_responses_words():
            prompt = Prompt(await encode_chat(text, messages, chat, tool_use))
            limit = tokens_left(
                len(prompt.token_ids), fields.max_output_tokens, None, text.facts.max_model_len, "messages"
            )
            logprobs = (fields.top_logprobs or 0) if chat.logprobs else None
            job = job_of("resp", chat, text, adapter, [prompt], [limit], logprobs=logprobs, tool_use=tool_use)
        if job.grammar_param == "response_format":
            job = replace(job, grammar_param="text.format")
        writer = ResponsesWriter(job, fields, tool_use, partial(_keep, _store(request), items))
        return model, job, writer

    return await answer(request, prepare, bool(fields.stream))


@get("/v1/responses/{response_id:str}")
async def retrieve(request: Request) -> ASGIApp:
    """A response that was stored."""
    if request.query_params.get("stream") in ("true", "True", "1"):
        raise InvalidRequestError("Stored responses cannot be streamed again.", param="stream")
    return json_bytes(bytes((await _find(request)).body))


@delete("/v1/responses/{response_id:str}", status_code=200)
async def remove(request: Request) -> ASGIApp:
    """Forget a response; those that went on from it cannot be gone on from any more."""
    response_id = _id(request)
    if not await _store(request).delete(response_id):
        raise _unknown(response_id)
    return json_answer(DeletedResponse(id=response_id))


@post("/v1/responses/{response_id:str}/cancel", status_code=200)
async def cancel(request: Request) -> ASGIApp:
    """OpenAI cancels background responses only; here there are none. Leaving a request ends it."""
    await _find(request)
    raise InvalidRequestError("Cannot cancel a synchronous response.", param="response_id")


@get("/v1/responses/{response_id:str}/input_items")
async def input_items(request: Request) -> ASGIApp:
    """What a response answered, latest first unless asked otherwise."""
    items = list((await _find(request)).input_items)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("'order' must be 'asc' or 'desc'.", param="order", code="invalid_value")
    if order == "desc":
        items.reverse()
    after = request.query_params.get("after")
    if after is not None:
        place = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise InvalidRequestError("'after' is no item of this response.", param="after")
        items = items[place + 1 :]
    page = items[: _limit(request.query_params.get("limit", "20"))]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return json_answer(ItemList(data=page, first_id=first, last_id=last, has_more=len(page) < len(items)))


RESPONSES_ROUTES = [create, retrieve, remove, cancel, input_items]


class _Kept(msgspec.Struct, frozen=True):
    """A response as it is stored."""

    body: msgspec.Raw
    """As it was sent."""
    input_items: list[dict[str, Any]]
    """Of its own request, without those of the responses before it."""


async def _keep(store: StoredResponses, items: list[dict[str, Any]], response: Response) -> None:
    payload = msgspec.json.encode(_Kept(msgspec.Raw(msgspec.json.encode(response)), items))
    await store.put(
        KeptResponse(
            response.id,
            payload,
            response.created_at,
            response.created_at + KEPT_S,
            response.previous_response_id,
        )
    )


async def _conversation(store: StoredResponses, response_id: str | None) -> list[dict[str, Any]]:
    """All items up to and with the response, first to last."""
    if response_id is None:
        return []
    turns = await store.chain(response_id)
    if len(turns) >= MAX_CHAIN:
        raise InvalidRequestError(
            f"More than {MAX_CHAIN - 1} responses in a row.", param="previous_response_id"
        )
    absent = turns[0].previous_id if turns else response_id
    if absent is not None:
        raise InvalidRequestError(
            f"Previous response with id '{absent[:80]}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    kept = [msgspec.json.decode(turn.payload, type=_Kept) for turn in turns]
    return [item for turn in kept for item in replayed(turn.input_items, bytes(turn.body))]


async def _find(request: Request) -> _Kept:
    stored = await _store(request).get(_id(request))
    if stored is None:
        raise _unknown(_id(request))
    return msgspec.json.decode(stored.payload, type=_Kept)


def _unknown(response_id: str) -> NotFoundError:
    return NotFoundError(f"Response with id '{response_id[:80]}' not found.", param="response_id")


def _id(request: Request) -> str:
    return str(request.path_params["response_id"])


def _store(request: Request) -> StoredResponses:
    return request.app.state.responses


def _limit(given: str) -> int:
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= MAX_PAGE:
        raise InvalidRequestError(f"'limit' must lie between 1 and {MAX_PAGE}.", param="limit")
    return int(given)
