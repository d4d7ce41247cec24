"""Request body -> checked request: types, ranges, and a refusal by name of what we do not do. Knows no model.

A parameter is understood, or without effect as given, or refused: none is ignored that would change the output.
"""

import re
from typing import Any, TypeVar

import msgspec

from engine.protocol import SamplingParams
from gateway.answer_format import grammar_of
from gateway.errors import InvalidRequestError, UnsupportedParameterError
from gateway.openai_schema import (
    ChatFields,
    CompletionFields,
    EmbeddingFields,
    GenerationFields,
    TokenizeFields,
)
from gateway.parameters import parameters_of

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024
"""Of one request: prompts times n."""
MAX_STOP_TOKEN_IDS = 64
MAX_MERGED_ADAPTERS = 8
MAX_ADAPTER_WEIGHT = 100
TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""That every chat template is given."""

_OWN_FIELDS = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
"""Of messages, by their role."""

Fields = TypeVar("Fields", bound=msgspec.Struct)


def decode(body: bytes, shape: type[Fields]) -> Fields:
    """A request body as `shape`.

    Raises:
        InvalidRequestError: malformed JSON, wrong types, a field missing, unknown or not supported.
    """
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {_brief(str(error))}") from error
    if not isinstance(document, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    given = {name: value for name, value in document.items() if value is not None}
    for name in given.keys() - set(shape.__struct_fields__):
        _refuse_unless_harmless(name, given[name], shape)
    try:
        return msgspec.convert(given, shape)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise _invalid_shape(str(error)) from error


def check_chat(fields: ChatFields) -> list[dict[str, Any]]:
    """Ranges of a chat request; its messages as chat templates want them."""
    check_chat_ranges(fields)
    return check_messages(fields.messages)


def check_chat_ranges(fields: ChatFields) -> None:
    _check_generation(fields)
    _in_range("max_completion_tokens", fields.max_completion_tokens, 1, None)
    _in_range("max_tokens", fields.max_tokens, 1, None)
    _in_range("top_logprobs", fields.top_logprobs, 0, 20)
    check_chat_options(fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if None not in (fields.max_tokens, fields.max_completion_tokens) and (
        fields.max_tokens != fields.max_completion_tokens
    ):
        raise InvalidRequestError(
            "Give 'max_tokens' or 'max_completion_tokens', not both.", param="max_tokens"
        )


def check_chat_options(fields: ChatFields | TokenizeFields) -> None:
    """What is said about the chat template.

    Raises:
        InvalidRequestError: it contradicts itself, or would replace what the template is given anyway.
    """
    if fields.continue_final_message and fields.add_generation_prompt:
        raise InvalidRequestError(
            "Give 'continue_final_message' or 'add_generation_prompt', not both.",
            param="continue_final_message",
        )
    for name in TEMPLATE_VARIABLES & (fields.chat_template_kwargs or {}).keys():
        raise UnsupportedParameterError(
            f"'chat_template_kwargs' cannot set '{name}'.", param=f"chat_template_kwargs.{name}"
        )


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: role, content and name, all text; calls with their arguments as an object.

    Raises:
        InvalidRequestError: there is none, one has an unknown role or a content that is not text, or a result is not
            that of a call before it.
    """
    if not messages:
        raise InvalidRequestError(
            "'messages' must hold at least one message.", param="messages", code="empty_array"
        )
    called: dict[str, str] = {}
    return [_message(message, f"messages[{index}]", called) for index, message in enumerate(messages)]


def check_completion(fields: CompletionFields) -> list[str | list[int]]:
    """Ranges of a completion request; its prompts, each a text or token ids."""
    _check_generation(fields)
    _in_range("logprobs", fields.logprobs, 0, 5)
    _in_range("max_tokens", fields.max_tokens, 0 if fields.echo else 1, None)
    n = fields.n or 1
    if fields.best_of is not None and fields.best_of > n:
        raise UnsupportedParameterError("'best_of' greater than 'n' is not supported.", param="best_of")
    if fields.best_of is not None and fields.best_of < n:
        raise InvalidRequestError("'best_of' must be at least 'n'.", param="best_of")
    if fields.echo and fields.truncate_prompt_tokens is not None:
        raise UnsupportedParameterError(
            "'truncate_prompt_tokens' with 'echo' is not supported.", param="truncate_prompt_tokens"
        )
    prompts = _prompts(fields.prompt)
    if len(prompts) * n > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with n={n} are too many: at most {MAX_SEQUENCES} choices a request.",
            param="prompt",
        )
    return prompts


def check_embedding(fields: EmbeddingFields) -> list[str | list[int]]:
    """Ranges of a request for embeddings; its inputs, each a text or token ids."""
    _in_range("priority", fields.priority, -(2**31), 2**31 - 1)
    if fields.truncate_prompt_tokens != -1:
        _in_range("truncate_prompt_tokens", fields.truncate_prompt_tokens, 1, 2**31 - 1)
    return _prompts(fields.input, "input")


def stops_of(fields: GenerationFields) -> list[str]:
    return [fields.stop] if isinstance(fields.stop, str) else fields.stop or []


def sampling_of(
    fields: GenerationFields, *, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """Everything but `max_tokens` (here 0), which depends on the prompt's length."""
    or_else = _or_else
    top_p = or_else(fields.top_p, 1.0)
    return SamplingParams(
        max_tokens=0,
        min_tokens=or_else(fields.min_tokens, 0),
        # Keeping the likeliest token alone is greedy decoding.
        temperature=0.0 if top_p == 0 else or_else(fields.temperature, 1.0),
        top_k=max(0, or_else(fields.top_k, 0)),
        top_p=1.0 if top_p == 0 else top_p,
        min_p=or_else(fields.min_p, 0.0),
        repetition_penalty=or_else(fields.repetition_penalty, 1.0),
        frequency_penalty=or_else(fields.frequency_penalty, 0.0),
        presence_penalty=or_else(fields.presence_penalty, 0.0),
        logit_bias={int(token): bias for token, bias in (fields.logit_bias or {}).items()},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        grammar=grammar_of(fields),
    )


def check_token_ids(fields: GenerationFields, vocab_size: int) -> None:
    """Ids named in the request must be tokens of the model."""
    for token in fields.logit_bias or {}:
        if int(token) >= vocab_size:
            raise InvalidRequestError(
                f"Invalid key in 'logit_bias': {token} is no token id of this model (0 to {vocab_size - 1}).",
                param="logit_bias",
            )
    for token in fields.stop_token_ids or []:
        if token >= vocab_size:
            raise InvalidRequestError(
                f"'stop_token_ids': {token} is no token id of this model (0 to {vocab_size - 1}).",
                param="stop_token_ids",
            )


def _check_generation(fields: GenerationFields) -> None:
    _in_range("n", fields.n, 1, MAX_CHOICES)
    _in_range("temperature", fields.temperature, 0, 2)
    _in_range("top_p", fields.top_p, 0, 1)
    _in_range("frequency_penalty", fields.frequency_penalty, -2, 2)
    _in_range("presence_penalty", fields.presence_penalty, -2, 2)
    _in_range("top_k", fields.top_k, -1, 2**31 - 1)
    _in_range("min_p", fields.min_p, 0, 1)
    _in_range("repetition_penalty", fields.repetition_penalty, 0.01, 10)
    _in_range("min_tokens", fields.min_tokens, 0, 2**31 - 1)
    _in_range("deadline_s", fields.deadline_s, 0.001, 86_400)
    _in_range("priority", fields.priority, -(2**31), 2**31 - 1)
    _in_range("seed", fields.seed, -(2**63), 2**63 - 1)
    if fields.truncate_prompt_tokens != -1:
        _in_range("truncate_prompt_tokens", fields.truncate_prompt_tokens, 1, 2**31 - 1)
    if fields.include_stop_str_in_output and fields.stop_token_ids:
        raise UnsupportedParameterError(
            "'include_stop_str_in_output' with 'stop_token_ids' is not supported.",
            param="include_stop_str_in_output",
        )
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    stops = stops_of(fields)
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(
            f"Invalid 'stop': array too long. Expected at most {MAX_STOPS} strings, got {len(stops)}.",
            param="stop",
            code="array_above_max_length",
        )
    if "" in stops:
        raise InvalidRequestError(
            "Invalid 'stop': a stop string must not be empty.", param="stop", code="empty_string"
        )
    for token, bias in (fields.logit_bias or {}).items():
        if not re.fullmatch(r"[0-9]{1,9}", token):
            raise InvalidRequestError(
                f"Invalid key in 'logit_bias': {_brief(repr(token))} is no token id.", param="logit_bias"
            )
        _in_range("logit_bias", bias, -100, 100)
    if len(fields.stop_token_ids or []) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"Invalid 'stop_token_ids': at most {MAX_STOP_TOKEN_IDS} are possible.", param="stop_token_ids"
        )
    for token in fields.stop_token_ids or []:
        _in_range("stop_token_ids", token, 0, 2**31 - 1)
    if fields.adapters is not None and not 1 <= len(fields.adapters) <= MAX_MERGED_ADAPTERS:
        raise InvalidRequestError(
            f"Invalid 'adapters': from 1 to {MAX_MERGED_ADAPTERS} can be merged, got {len(fields.adapters)}.",
            param="adapters",
            code="array_above_max_length" if fields.adapters else "empty_array",
        )
    for index, adapter in enumerate(fields.adapters or []):
        _in_range(f"adapters[{index}].weight", adapter.weight, -MAX_ADAPTER_WEIGHT, MAX_ADAPTER_WEIGHT)


def _message(message: dict[str, Any], where: str, called: dict[str, str]) -> dict[str, Any]:
    """One message; `called` are the names of the functions called so far, by the calls' ids."""
    role = message.get("role")
    if role is None:
        raise InvalidRequestError(f"Missing required parameter: '{where}.role'.", param=f"{where}.role")
    if role == "function":
        raise UnsupportedParameterError(
            "Messages of role 'function' are not supported; use 'tool'.", param=f"{where}.role"
        )
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise InvalidRequestError(
            f"Invalid value: {_brief(repr(role))}. Supported values are: 'system', 'developer', 'user', 'assistant' and "
            "'tool'.",
            param=f"{where}.role",
            code="invalid_value",
        )
    known = {"role", "content", "name", *_OWN_FIELDS.get(role, ())}
    for name, value in message.items():
        if name not in known and value not in (None, [], {}, ""):
            raise UnsupportedParameterError(
                f"Unsupported parameter: '{where}.{_brief(name)}'.", param=f"{where}.{_brief(name)}"
            )
    calls = (
        _tool_calls(message.get("tool_calls"), f"{where}.tool_calls", called) if role == "assistant" else []
    )
    content = "" if calls and message.get("content") is None else _content(message.get("content"), where)
    rendered: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if calls:
        rendered["tool_calls"] = calls
    if role == "tool":
        rendered["tool_call_id"] = call_id = _called_id(message.get("tool_call_id"), where, called)
        rendered["name"] = called[call_id]
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise InvalidRequestError(f"'{where}.name' must be a string.", param=f"{where}.name")
        rendered["name"] = name
    return rendered


def _tool_calls(calls: Any, where: str, called: dict[str, str]) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise InvalidRequestError(f"'{where}' must be a list.", param=where, code="invalid_type")
    rendered: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        match call:
            case {
                "id": str(call_id),
                "type": "function",
                "function": {"name": str(name), "arguments": str(arguments)},
            }:
                called[call_id] = name
                function = {"name": name, "arguments": _arguments(arguments)}
                rendered.append({"id": call_id, "type": "function", "function": function})
            case _:
                raise InvalidRequestError(
                    f"'{where}[{index}]' must have an 'id', the type 'function', and a 'function' with 'name' and "
                    "'arguments', both strings.",
                    param=f"{where}[{index}]",
                )
    return rendered


def _arguments(text: str) -> Any:
    """As an object, which templates write in their own way; what a model once got wrong stays as it was."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def _called_id(call_id: Any, where: str, called: dict[str, str]) -> str:
    param = f"{where}.tool_call_id"
    if call_id is None:
        raise InvalidRequestError(f"Missing required parameter: '{param}'.", param=param)
    if not isinstance(call_id, str) or call_id not in called:
        raise InvalidRequestError(
            f"'{param}': messages with role 'tool' must answer one of the 'tool_calls' of a message before them.",
            param=param,
        )
    return call_id


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    param = f"{where}.content"
    if content is None:
        raise InvalidRequestError(f"Missing required parameter: '{param}'.", param=param)
    if not isinstance(content, list):
        raise InvalidRequestError(f"'{param}' must be a string or a list of text parts.", param=param)
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequestError(
                f"'{param}[{index}]' must be an object with a 'type'.", param=f"{param}[{index}]"
            )
        if kind != "text":
            raise UnsupportedParameterError(
                f"Content of type {_brief(repr(kind))} is not supported by this model, only 'text'.",
                param=f"{param}[{index}].type",
            )
        if not isinstance(text := part.get("text"), str):
            raise InvalidRequestError(
                f"'{param}[{index}].text' must be a string.", param=f"{param}[{index}].text"
            )
        texts.append(text)
    return "\n".join(texts)


def _prompts(prompt: str | list[Any], param: str = "prompt") -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [_prompt_text(prompt, param)]
    if not prompt:
        raise InvalidRequestError(f"'{param}' must not be empty.", param=param, code="empty_array")
    if _is_token_ids(prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(
            f"Invalid '{param}': array too long. Expected at most {MAX_PROMPTS} prompts, got {len(prompt)}.",
            param=param,
            code="array_above_max_length",
        )
    if all(isinstance(each, str) for each in prompt):
        return [_prompt_text(each, param) for each in prompt]
    if all(isinstance(each, list) and each and _is_token_ids(each) for each in prompt):
        return prompt
    raise InvalidRequestError(
        f"'{param}' must be a string, a list of strings, a list of token ids, or a list of lists of token ids.",
        param=param,
    )


def _prompt_text(prompt: str, param: str) -> str:
    if not prompt:
        raise InvalidRequestError(f"'{param}' must not be empty.", param=param, code="empty_string")
    return prompt


def _is_token_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _in_range(param: str, value: float | None, low: float, high: float | None) -> None:
    if value is None:
        return
    if value < low:
        raise InvalidRequestError(
            f"Invalid '{param}': must be at least {low}, got {_brief(repr(value))}.",
            param=param,
            code="integer_below_min_value" if isinstance(value, int) else "decimal_below_min_value",
        )
    if high is not None and value > high:
        raise InvalidRequestError(
            f"Invalid '{param}': must be at most {high}, got {_brief(repr(value))}.",
            param=param,
            code="integer_above_max_value" if isinstance(value, int) else "decimal_above_max_value",
        )


def _refuse_unless_harmless(name: str, value: Any, shape: type[msgspec.Struct]) -> None:
    parameter = parameters_of(shape).get(name)
    if parameter is None:
        raise InvalidRequestError(
            f"Unrecognized request argument supplied: {_brief(name)}",
            param=_brief(name),
            code="unknown_parameter",
        )
    if not parameter.accepts(value):
        hint = f": {parameter.note}" if parameter.note else ""
        raise UnsupportedParameterError(
            f"Unsupported parameter: '{name}' (as given here) is not supported by this server{hint}.",
            param=name,
        )


def _invalid_shape(problem: str) -> InvalidRequestError:
    """msgspec's message (`Expected `int`, got `str` - at `$.n``) as OpenAI would put it."""
    if missing := re.match(r"Object missing required field `(\w+)`", problem):
        name = missing[1]
        return InvalidRequestError(
            f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
        )
    at = re.search(r" - at `(?:key in )?\$\.?([^`]*)`$", problem)
    param = at[1].replace("[...]", "") if at else None
    what = problem[: at.start()] if at else problem
    if param is None:
        return InvalidRequestError(f"Invalid request: {_brief(what)}.")
    return InvalidRequestError(
        f"Invalid type for '{param}': {_brief(what)}.", param=param, code="invalid_type"
    )


def _brief(text: str) -> str:
    """What a caller sent, short enough and encodable, to be quoted in a message."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= 80 else text[:79] + "…"


def _or_else(value: Any, default: Any) -> Any:
    return default if value is None else value
