"""What an answer must look like, read from a request: OpenAI's `response_format` and vLLM's extras. Knows no tokens."""

from typing import Any

import msgspec

from engine.protocol import Grammar
from gateway.errors import InvalidRequestError
from gateway.openai_schema import ChatFields, GenerationFields

MAX_CHOICES = 1000


def grammar_of(fields: GenerationFields) -> Grammar | None:
    """The grammar that a request asks for, or None.

    Raises:
        InvalidRequestError: malformed, or asked for in two ways. Whether a schema can be used is found by the engine.
    """
    asked = [
        *_of_response_format(fields.response_format if isinstance(fields, ChatFields) else None),
        *_of_options("structured_outputs", fields.structured_outputs),
        *_of_options(
            None,
            {
                "json": fields.guided_json,
                "regex": fields.guided_regex,
                "choice": fields.guided_choice,
                "grammar": fields.guided_grammar,
            },
        ),
    ]
    if len(asked) > 1:
        names = " and ".join(param for param, _ in asked)
        raise InvalidRequestError(f"The format of the answer is given twice: {names}.", param=asked[1][0])
    return asked[0][1] if asked else None


def _of_response_format(value: dict[str, Any] | None) -> list[tuple[str, Grammar]]:
    param = "response_format"
    if value is None:
        return []
    match value.get("type"):
        case "text":
            return []
        case "json_object":
            # With a schema beside it: LoRAX's way to say json_schema.
            schema = value.get("schema")
            return [(param, _schema(schema) if isinstance(schema, dict) else Grammar("json_object"))]
        case "json_schema":
            wrapper = value.get("json_schema")
            if not isinstance(wrapper, dict) or not isinstance(wrapper.get("name"), str):
                raise InvalidRequestError(
                    "'response_format.json_schema' must be an object with a 'name' and a 'schema'.",
                    param="response_format.json_schema",
                )
            schema = wrapper.get("schema")
            if not isinstance(schema, dict):
                raise InvalidRequestError(
                    "Missing required parameter: 'response_format.json_schema.schema'.",
                    param="response_format.json_schema.schema",
                    code="missing_required_parameter",
                )
            return [(param, _schema(schema))]
        case kind:
            raise InvalidRequestError(
                f"Invalid value: {str(kind)[:100]!r}. Supported values are: 'text', 'json_object', and 'json_schema'.",
                param="response_format.type",
                code="invalid_value",
            )


def _of_options(group: str | None, options: dict[str, Any] | None) -> list[tuple[str, Grammar]]:
    """vLLM's: `structured_outputs` with one of these keys, or each as a field of its own, called `guided_<key>`."""
    found: list[tuple[str, Grammar]] = []
    for key, value in (options or {}).items():
        param = f"{group}.{key[:100]}" if group else f"guided_{key}"
        if value is None or (key == "json_object" and value is False):
            continue
        match key, value:
            case "json", dict():
                grammar = _schema(value)
            case "json", str():
                grammar = Grammar("json_schema", value)
            case "regex", str():
                grammar = Grammar("regex", value)
            case "grammar", str():
                grammar = Grammar("lark", value)
            case "json_object", True:
                grammar = Grammar("json_object")
            case "choice", list() if _are_choices(value):
                grammar = Grammar("choice", msgspec.json.encode(value).decode())
            case _:
                raise InvalidRequestError(f"Invalid '{param}'.", param=param, code="invalid_type")
        found.append((param, grammar))
    return found


def _schema(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", msgspec.json.encode(schema).decode())


def _are_choices(values: list[Any]) -> bool:
    return 0 < len(values) <= MAX_CHOICES and all(isinstance(value, str) and value for value in values)
