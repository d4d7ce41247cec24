"""Which grammar a request asks for."""

import json
from typing import Any

import pytest

from engine.protocol import Grammar
from gateway.answer_format import grammar_of
from gateway.errors import InvalidRequestError
from gateway.openai_request import decode
from gateway.openai_schema import ChatFields, CompletionFields

SCHEMA = {"type": "object"}
OPENAI = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


def chat(**body: Any) -> Grammar | None:
    raw = {"model": "m", "messages": [{"role": "user", "content": "x"}], **body}
    return grammar_of(decode(json.dumps(raw).encode(), ChatFields))


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"response_format": OPENAI}, Grammar("json_schema", '{"type":"object"}')),
        ({"guided_json": SCHEMA}, Grammar("json_schema", '{"type":"object"}')),
        ({"guided_json": "{}"}, Grammar("json_schema", "{}")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a","b"]')),
        ({"guided_grammar": "start: x"}, Grammar("lark", "start: x")),
        ({"structured_outputs": {"regex": "a"}}, Grammar("regex", "a")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"json_object": False, "json": None}}, None),
    ],
)
def test_it_is_read_from_openais_and_vllms_fields(body, grammar):
    assert chat(**body) == grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"what": "x"}}, "structured_outputs.what"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": OPENAI}, "guided_regex"),
    ],
)
def test_what_is_malformed_or_asked_twice_is_refused(body, param):
    with pytest.raises(InvalidRequestError) as refused:
        chat(**body)
    assert refused.value.param == param


def test_completions_take_vllms_fields():
    fields = decode(b'{"model": "m", "prompt": "x", "guided_regex": "a"}', CompletionFields)
    assert grammar_of(fields) == Grammar("regex", "a")
