"""What a request says of tools: which functions there are, whether one must be called, how. Knows no answers."""

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.protocol import Grammar
from gateway.answer_format import grammar_of
from gateway.errors import InvalidRequestError, UnsupportedParameterError
from gateway.model_text import ModelText
from gateway.openai_schema import ChatFields
from gateway.tool_calls import FORCED, SYNTAX, Syntax, ToolCallReader, ToolFormat, format_of_template

MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 64
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that may be called."""

    definitions: list[dict[str, Any]]
    """As chat templates want them: `{"type": "function", "function": {name, description, parameters}}`."""
    forced: bool
    """One of them must be called."""
    single: bool
    """Not more than one call."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.definitions)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How the calls of one request are asked for and read."""

    tools: Tools
    syntax: Syntax
    short_ids: bool
    """Mistral's templates want nine letters and digits."""
    shows_tools: bool
    """The chat template does; else a system message must."""
    prompt_end: str
    """What the prompt ends with so that the answer goes on as a call."""
    grammar: Grammar | None
    """What the answer must follow when a call is forced."""

    def reader(self) -> ToolCallReader:
        return ToolCallReader(self.syntax, self.tools.names, single=self.tools.single)


def read_tools(tools: list[dict[str, Any]] | None, choice: Any, parallel: bool | None) -> Tools | None:
    """The tools to show to the model; None for none, or when none may be called.

    Raises:
        InvalidRequestError: a definition is malformed, or `choice` names what there is not.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                "'tool_choice' is only allowed when 'tools' are given.", param="tool_choice"
            )
        return None
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"Invalid 'tools': array too long. Expected at most {MAX_TOOLS} tools, got {len(tools)}.",
            param="tools",
            code="array_above_max_length",
        )
    definitions = [_definition(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    single = parallel is False
    match choice:
        case None | "auto":
            return Tools(definitions, forced=False, single=single)
        case "none":
            return None
        case "required":
            return Tools(definitions, forced=True, single=single)
        case {"type": "function", "function": {"name": str(name)}}:
            return Tools(_only(definitions, [name]), forced=True, single=True)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(allowed)},
        }:
            names = [_allowed_name(tool) for tool in allowed]
            return Tools(_only(definitions, names), forced=mode == "required", single=single)
        case {"type": "custom"}:
            raise UnsupportedParameterError(
                "Custom tools are not supported, only functions.", param="tool_choice"
            )
    raise InvalidRequestError(
        "Invalid 'tool_choice': give 'none', 'auto', 'required', "
        '{"type": "function", "function": {"name": ...}} or allowed tools.',
        param="tool_choice",
        code="invalid_value",
    )


def use_of(tools: Tools, text: ModelText, configured: ToolFormat | None) -> ToolUse:
    """How this model is to be asked for calls, and its calls read.

    Raises:
        InvalidRequestError: its template knows no tools and no call is forced, or we cannot read its way of calling.
    """
    template = text.template
    shows_tools = template is not None and template.knows_tools
    form = (configured or format_of_template(template.tool_source)) if template and shows_tools else None
    short_ids = form == "mistral"
    if tools.forced:
        as_list = form == "mistral" or not tools.single
        prompt_end = {"mistral": "[TOOL_CALLS]", "hermes": "" if as_list else "<tool_call>\n"}.get(
            form or "", ""
        )
        grammar = _forcing_grammar(tools, as_list=as_list)
        return ToolUse(tools, FORCED, short_ids, shows_tools, prompt_end, grammar)
    if not shows_tools:
        raise InvalidRequestError(
            f"The chat template of {text.facts.name!r} knows no tools, so this model cannot choose to call one. Leave "
            "'tools' out, or force a call with 'tool_choice'.",
            param="tools",
            code="unsupported_parameter",
        )
    if form is None:
        raise InvalidRequestError(
            f"How {text.facts.name!r} writes function calls is not known to this server, so only forced calls "
            "('tool_choice') are possible. Its operator can name a format in 'tool_format'.",
            param="tools",
            code="unsupported_parameter",
        )
    return ToolUse(tools, SYNTAX[form], short_ids, shows_tools, "", None)


def check_format_beside_tools(fields: ChatFields, use: ToolUse | None) -> None:
    """A grammar cannot hold for the answer and leave the model its choice of calling, nor can there be two.

    Raises:
        InvalidRequestError: both are asked for. OpenAI's `response_format` is not that of forced calls, so it may stand.
    """
    if use is None or grammar_of(fields) is None:
        return
    if not use.tools.forced:
        raise InvalidRequestError(
            "The format of the answer and tools that the model may choose to call cannot be asked for together: give "
            "'tool_choice' as 'none', 'required' or a function.",
            param="tool_choice",
        )
    if grammar_of(msgspec.structs.replace(fields, response_format=None)) is not None:
        raise InvalidRequestError(
            "The format of the answer is given twice: by a forced call and by a grammar.", param="tool_choice"
        )


def with_tools_in_words(messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """For a template that knows no tools: a system message that shows them, before a forced call."""
    listed = "\n".join(msgspec.json.encode(tool["function"]).decode() for tool in tools.definitions)
    words = (
        f"These functions can be called:\n{listed}\n"
        'Answer with a call as JSON: {"name": <name of the function>, "arguments": <its arguments>}.'
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _definition(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        if isinstance(kind, str):
            raise UnsupportedParameterError(
                f"Tools of type {kind[:80]!r} are not supported, only 'function'.", param=f"{where}.type"
            )
        raise InvalidRequestError(f"Missing required parameter: '{where}.type'.", param=f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequestError(
            f"Missing required parameter: '{where}.function'.", param=f"{where}.function"
        )
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
        raise InvalidRequestError(
            f"Invalid '{where}.function.name': give 1 to 64 letters, digits, underscores and dashes.",
            param=f"{where}.function.name",
            code="invalid_value",
        )
    shown: dict[str, Any] = {"name": name}
    if (description := function.get("description")) is not None:
        if not isinstance(description, str):
            raise InvalidRequestError(
                f"'{where}.function.description' must be a string.", param=f"{where}.function.description"
            )
        shown["description"] = description
    shown["parameters"] = _parameters(function, f"{where}.function.parameters")
    return {"type": "function", "function": shown}


def _parameters(function: dict[str, Any], param: str) -> dict[str, Any]:
    schema = function.get("parameters") or NO_PARAMETERS
    strict = function.get("strict")
    if strict not in (None, True, False):
        where = param.replace(".parameters", ".strict")
        raise InvalidRequestError(f"'{where}' must be a boolean.", param=where, code="invalid_type")
    problem = None
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        problem = "it must be a JSON Schema of type 'object'"
    elif _is_deep(schema):
        problem = f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep"
    elif strict:
        problem = _looseness(schema, "the schema")
    if problem is not None:
        raise InvalidRequestError(
            f"Invalid schema for function '{function['name']}': {problem}.",
            param=param,
            code="invalid_function_parameters",
        )
    return schema


def _is_deep(schema: Any) -> bool:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _looseness(schema: Any, where: str) -> str | None:
    """What keeps a schema from being strict, as OpenAI understands it: closed objects whose properties are required."""
    if isinstance(schema, list):
        return next((found for each in schema if (found := _looseness(each, where))), None)
    if not isinstance(schema, dict):
        return None
    properties = schema.get("properties")
    if isinstance(properties, dict):
        if schema.get("additionalProperties") is not False:
            return f"with 'strict', 'additionalProperties' of {where} must be false"
        required = schema.get("required")
        missing = [name for name in properties if not isinstance(required, list) or name not in required]
        if missing:
            return f"with 'strict', 'required' of {where} must name every property, {missing[0][:80]!r} too"
        for name, inner in properties.items():
            if found := _looseness(inner, repr(name[:80])):
                return found
    for key in ("items", "anyOf"):
        if found := _looseness(schema.get(key), where):
            return found
    for key in ("$defs", "definitions"):
        if isinstance(definitions := schema.get(key), dict) and (
            found := _looseness([*definitions.values()], key)
        ):
            return found
    return None


def _allowed_name(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise InvalidRequestError(
        "Invalid 'tool_choice': each allowed tool must be a function with a name.", param="tool_choice"
    )


def _only(definitions: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    known = {tool["function"]["name"] for tool in definitions}
    for name in names:
        if name not in known:
            raise InvalidRequestError(
                f"Invalid 'tool_choice': there is no function {name[:80]!r} in 'tools'.", param="tool_choice"
            )
    if not names:
        raise InvalidRequestError("Invalid 'tool_choice': no tool is allowed.", param="tool_choice")
    return [tool for tool in definitions if tool["function"]["name"] in names]


def _forcing_grammar(tools: Tools, *, as_list: bool) -> Grammar:
    """An object, or a list of objects, each a function's name and arguments that fit its parameters."""
    calls, definitions = [], {}
    for index, tool in enumerate(tools.definitions):
        function = tool["function"]
        # References in a schema start at its root, which is no longer the root here.
        own = f"function{index}"
        definitions[own] = _moved(function["parameters"], f"#/$defs/{own}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{own}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if as_list:
        schema = {"type": "array", "items": schema, "minItems": 1}
        if tools.single:
            schema["maxItems"] = 1
    return Grammar("json_schema", msgspec.json.encode({**schema, "$defs": definitions}).decode())


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }
