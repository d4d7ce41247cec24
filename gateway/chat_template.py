"""Messages -> prompt text, by the model's own Jinja template under transformers' conventions. Knows no tokens."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import msgspec
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

END_MARK = "\ue000end of message\ue000 "
"""Put behind a message to be continued, to see where the template writes its end. Templates may trim the space."""


class ChatTemplateError(Exception):
    """The template refuses these messages, or cannot be used at all; the message says why."""


class ChatTemplate:
    """One model's chat template.

    Args:
        source: The Jinja text.
        special_tokens: What templates call `bos_token`, `eos_token`, ...
        tool_source: Another template, for chats with tools.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], tool_source: str | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.tool_source = source if tool_source is None else tool_source
            self._tool_template = environment.from_string(self.tool_source)
            self.knows_tools = "tools" in find_undeclared_variables(environment.parse(self.tool_source))
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"The chat template is not valid: {error}") from error
        self._special_tokens = special_tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that asks for the assistant's next message, or that breaks off where the last one ends.

        Args:
            tools: Functions to show, as in OpenAI's API.
            variables: More of what the template may ask about, e.g. `enable_thinking`.

        Raises:
            ChatTemplateError: the template refuses the messages (e.g. roles must alternate).
        """
        if continue_final_message:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": (last.get("content") or "") + END_MARK}]
        given = {
            **self._special_tokens,
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            template = self._tool_template if tools or any(map(is_about_tools, messages)) else self._template
            prompt = template.render(given)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"The model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(
                f"The model's chat template cannot render these messages: {error}"
            ) from error
        return _up_to_mark(prompt) if continue_final_message else prompt


def is_about_tools(message: dict[str, Any]) -> bool:
    """Whether a message is a function's result, or calls one."""
    return message["role"] == "tool" or "tool_calls" in message


def read_chat_template(tokenizer_config: bytes) -> ChatTemplate | None:
    """The template in `tokenizer_config.json`, or None where there is none (a base model).

    Raises:
        ChatTemplateError: the file is no JSON object, or the template no Jinja.
    """
    try:
        config = msgspec.json.decode(tokenizer_config, type=dict[str, Any])
        source = msgspec.convert(config.get("chat_template"), str | list[_NamedTemplate] | None)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"tokenizer_config.json cannot be read: {error}") from error
    tool_source = None
    if isinstance(source, list):
        named = {each.name: each.template for each in source}
        source, tool_source = named.get("default"), named.get("tool_use")
    if source is None:
        return None
    special_tokens = {
        key: text
        for key, token in config.items()
        if key.endswith("_token")
        and isinstance(text := token.get("content") if isinstance(token, dict) else token, str)
    }
    return ChatTemplate(source, special_tokens, tool_source)


def _up_to_mark(prompt: str) -> str:
    """As in transformers, a message is continued without its last spaces if the template trims messages."""
    before, mark, after = prompt.rpartition(END_MARK.rstrip())
    if not mark:
        raise ChatTemplateError(
            "The model's chat template does not show the message that is to be continued."
        )
    return before if after.startswith(" ") else before.rstrip()


class _NamedTemplate(msgspec.Struct, frozen=True):
    """Models with several templates list them; ours are those called `default` and `tool_use`."""

    name: str
    template: str


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training; it renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
