"""A request of the Responses API -> the chat request that means the same. Knows no model and no store."""

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from gateway.errors import GatewayError, InvalidRequestError, UnsupportedParameterError
from gateway.openai_request import check_messages
from gateway.openai_schema import ChatFields
from gateway.responses_schema import ResponseFields

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
IGNORED_INCLUDES = ("reasoning.encrypted_content",)
"""Asks for something that this server never has."""
_IN_OUR_WORDS = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("messages", "input"),
    (".function.", "."),
)


@contextmanager
def in_responses_words() -> Iterator[None]:
    """Errors about the chat request name the parameters of the response it was made for."""
    try:
        yield
    except GatewayError as error:
        for chat, ours in _IN_OUR_WORDS:
            error.message = error.message.replace(f"'{chat}", f"'{ours}")
            error.param = error.param and error.param.replace(chat, ours)
        raise


def chat_of(fields: ResponseFields) -> ChatFields:
    """The parameters as those of a chat, without its messages.

    Raises:
        InvalidRequestError: a part of `text`, `include`, `tools` or `metadata` cannot be used.
    """
    for name in fields.include or []:
        if name != LOGPROBS and name not in IGNORED_INCLUDES:
            raise UnsupportedParameterError(f"'include' cannot name {name[:80]!r} here.", param="include")
    if len(fields.metadata or {}) > MAX_METADATA:
        raise InvalidRequestError(f"'metadata' holds at most {MAX_METADATA} pairs.", param="metadata")
    return ChatFields(
        model=fields.model,
        messages=[],
        stream=fields.stream,
        stream_options=fields.stream_options,
        max_completion_tokens=fields.max_output_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        logprobs=wants_logprobs(fields),
        top_logprobs=fields.top_logprobs,
        response_format=_response_format(fields.text or {}),
        tools=[_nested(tool) for tool in fields.tools or []],
        tool_choice=_nested_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls,
        seed=fields.seed,
        top_k=fields.top_k,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        priority=fields.priority,
        cache_salt=fields.cache_salt,
        deadline_s=fields.deadline_s,
        adapters=fields.adapters,
    )


def wants_logprobs(fields: ResponseFields) -> bool:
    return LOGPROBS in (fields.include or []) or bool(fields.top_logprobs)


def input_items_of(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as items that each have a type and an id.

    Raises:
        InvalidRequestError: it is empty.
    """
    if not given:
        raise InvalidRequestError("'input' must not be empty.", param="input", code="empty_array")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items: list[dict[str, Any]] = []
    for item in given:
        kind = item.get("type", "message")
        items.append(
            {"id": new_id(_PREFIXES.get(kind, "item") if isinstance(kind, str) else "item"), "type": kind}
            | item
        )
    return items


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def messages_of(
    instructions: str | None, earlier: Iterable[dict[str, Any]], items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages as chat templates want them.

    Args:
        earlier: Items of the responses before this one, known to be good.

    Raises:
        InvalidRequestError: an item is malformed or of a kind that we cannot show to a model; `input[i]` is named.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in earlier:
        _add(messages, item, "previous_response_id")
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]")
    with in_responses_words():
        return check_messages(messages)


_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}


def _add(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Calls join the assistant's message before them, as they stand in a chat."""
    match item.get("type", "message"):
        case "message":
            messages.append(
                {"role": item.get("role"), "content": _content(item.get("content"), f"{where}.content")}
            )
        case "function_call":
            if item.get("status") == "incomplete":
                return
            call_id, name, arguments = (_text(item, key, where) for key in ("call_id", "name", "arguments"))
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            call_id = _text(item, "call_id", where)
            called = (call["id"] for message in messages for call in message.get("tool_calls", []))
            if call_id not in called:
                raise InvalidRequestError(
                    f"'{where}': there is no function call with the call_id {call_id[:80]!r} before its output.",
                    param=where,
                )
            output = _content(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        case kind:
            raise UnsupportedParameterError(
                f"'{where}': items of type {str(kind)[:80]!r} are not supported.", param=f"{where}.type"
            )


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequestError(f"'{where}.{key}' must be a string.", param=f"{where}.{key}")
    return value


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"'{where}' must be a string or a list of parts.", param=where)
    texts: list[str] = []
    for index, part in enumerate(content):
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case {"type": ("input_text" | "output_text" | "text")}:
                raise InvalidRequestError(
                    f"'{where}[{index}].text' must be a string.", param=f"{where}[{index}].text"
                )
            case {"type": str(kind)}:
                raise UnsupportedParameterError(
                    f"Content of type {kind[:80]!r} is not supported by this model, only text.",
                    param=f"{where}[{index}].type",
                )
            case _:
                raise InvalidRequestError(
                    f"'{where}[{index}]' must be an object with a 'type'.", param=f"{where}[{index}]"
                )
    return "\n".join(texts)


def _response_format(text: dict[str, Any]) -> dict[str, Any] | None:
    for name, value in text.items():
        if name != "format" and value is not None:
            raise UnsupportedParameterError(
                f"'text.{name[:80]}' is not supported.", param=f"text.{name[:80]}"
            )
    asked = text.get("format")
    if asked is None:
        return None
    if not isinstance(asked, dict):
        raise InvalidRequestError("'text.format' must be an object.", param="text.format")
    if asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": {key: asked[key] for key in asked if key != "type"}}


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A function as chats have it: its fields one level deeper."""
    if tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _nested_choice(choice: Any) -> Any:
    match choice:
        case {"type": "function", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": list(tools)}:
            allowed = [_nested(tool) if isinstance(tool, dict) else tool for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    return choice


def replayed(items: list[dict[str, Any]], body: bytes) -> list[dict[str, Any]]:
    """What a stored response adds to the conversation: its input, then its output."""
    return [*items, *msgspec.json.decode(body)["output"]]
