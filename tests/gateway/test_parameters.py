"""The table of parameters says what really happens, and every supported one works through the official SDK."""

from typing import Any

import httpx
import msgspec
import openai
import pytest
from litestar.handlers import HTTPRouteHandler
from tokenizers import Tokenizer as HfTokenizer

from gateway import openai_schema as schema
from gateway.app import HANDLERS
from gateway.errors import UnsupportedParameterError
from gateway.openai_request import decode
from gateway.parameters import ENDPOINTS, PARAMETERS, Body, Handling, Parameter, parameters_of
from gateway.responses_schema import ResponseFields
from tests.gateway.conftest import encode
from tests.gateway.fake_engine import FakeEngine

LEAST: dict[Body, dict[str, Any]] = {
    schema.ChatFields: {"model": "base", "messages": [{"role": "user", "content": "hello"}]},
    schema.CompletionFields: {"model": "base", "prompt": "hello"},
    schema.EmbeddingFields: {"model": "base", "input": "hello"},
    ResponseFields: {"model": "base", "input": "hello"},
    schema.TokenizeFields: {"prompt": "hello"},
    schema.DetokenizeFields: {"tokens": [5]},
    schema.BatchFields: {
        "input_file_id": "file-1",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    },
    schema.LoadAdapterFields: {"lora_name": "any", "lora_path": "/any"},
    schema.UnloadAdapterFields: {"lora_name": "any"},
}
"""What each body needs at least."""
GENERATION: dict[str, Any] = {
    "n": 2,
    "stop": ["zzz"],
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": {"7": 1},
    "seed": 1,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "ignore_eos": True,
    "stop_token_ids": [3],
    "skip_special_tokens": False,
    "include_stop_str_in_output": False,
    "truncate_prompt_tokens": 3,
    "add_special_tokens": True,
    "priority": 1,
    "cache_salt": "mine",
    "deadline_s": 5,
    "adapter_id": "shapes",
}
"""A value of every parameter that both endpoints support, but for those in `ALONE`."""
ALONE = {
    "stream",
    "stream_options",
    "adapters",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
}
"""Not together with the others, or not with each other."""
CHAT: dict[str, Any] = {
    "max_completion_tokens": 5,
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_object"},
    "add_generation_prompt": False,
    "continue_final_message": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
}
COMPLETION: dict[str, Any] = {"echo": False, "logprobs": 2, "best_of": 2}
INTERNAL = {"/healthz", "/readyz", "/metrics", "/adapters"}
ROWS = [(parameter, body) for parameter in PARAMETERS for body in parameter.bodies]


def ids(value: Any) -> str | None:
    return value.name if isinstance(value, Parameter) else getattr(value, "__name__", None)


def supported(body: Body) -> set[str]:
    return {name for name, row in parameters_of(body).items() if row.handling is Handling.SUPPORTED}


def test_every_body_of_the_table_is_tried() -> None:
    assert {body for parameter in PARAMETERS for body in parameter.bodies} == set(LEAST)


@pytest.mark.parametrize("body", LEAST, ids=ids)
def test_what_the_table_calls_supported_are_the_fields_of_the_body(body: Body) -> None:
    assert supported(body) == set(body.__struct_fields__)


@pytest.mark.parametrize("body", LEAST, ids=ids)
def test_no_parameter_has_two_rows(body: Body) -> None:
    assert len(parameters_of(body)) == sum(body in parameter.bodies for parameter in PARAMETERS)


def test_every_address_that_is_served_is_in_the_table() -> None:
    served = {
        f"{method} {path}"
        for handler in HANDLERS
        if isinstance(handler, HTTPRouteHandler)
        for path in handler.paths
        for method in handler.http_methods
        if path not in INTERNAL
    }
    named = {endpoint.address for endpoint in ENDPOINTS if endpoint.handling is Handling.SUPPORTED}
    served = {address.replace("{model_id:path}", "{model}").replace(":str}", "}") for address in served}
    assert served == named


@pytest.mark.parametrize(("row", "body"), ROWS, ids=ids)
def test_a_row_is_kept(row: Parameter, body: Body) -> None:
    def send(value: Any) -> None:
        decode(msgspec.json.encode({**LEAST[body], row.name: value}), body)

    match row.handling:
        case Handling.IGNORED:
            values: list[Any] = ["anything", 1, {"a": [None]}]
        case Handling.REFUSED:
            with pytest.raises(UnsupportedParameterError) as refused:
                send({"no": "such"})
            assert refused.value.param == row.name
            values = [*row.harmless, None]
        case Handling.SUPPORTED:
            values = [] if row.name in LEAST[body] else [None]
    for value in values:
        send(value)


def test_every_supported_parameter_of_chats_is_taken_from_the_sdk(
    sdk: openai.OpenAI, engine: FakeEngine
) -> None:
    given = {**GENERATION, **CHAT}
    assert {*given, *ALONE, "model", "messages"} == supported(schema.ChatFields)
    messages = LEAST[schema.ChatFields]["messages"]
    answer = sdk.chat.completions.create(model="base", messages=messages, extra_body=given)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.choices[0].logprobs is not None


def test_every_supported_parameter_of_completions_is_taken_from_the_sdk(
    sdk: openai.OpenAI, engine: FakeEngine
) -> None:
    given = {**GENERATION, **COMPLETION}
    assert {*given, *ALONE, "model", "prompt"} == supported(schema.CompletionFields)
    answer = sdk.completions.create(model="base", prompt="hello", extra_body=given)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.choices[0].logprobs is not None


@pytest.mark.parametrize(
    "format_of_answer",
    [
        {"structured_outputs": {"regex": "a"}},
        {"guided_json": {"type": "object"}},
        {"guided_regex": "a+"},
        {"guided_choice": ["a", "b"]},
        {"guided_grammar": 'start: "a"'},
        {"adapters": [{"name": "shapes", "weight": 0.5}, {"name": "colours"}]},
    ],
)
def test_what_goes_alone_reaches_the_engine_too(
    sdk: openai.OpenAI, engine: FakeEngine, format_of_answer: dict[str, Any]
) -> None:
    sdk.completions.create(model="base", prompt="hello", extra_body=format_of_answer)
    (request,) = engine.requests
    assert request.sampling.grammar is not None or request.adapter is not None


def test_a_stream_with_options_is_taken_from_the_sdk(
    sdk: openai.OpenAI, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    stream = sdk.completions.create(
        model="base", prompt="hello", stream=True, stream_options={"include_usage": True}
    )
    usage = list(stream)[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == len(encode(hf_tokenizer, "hello"))


def test_a_parameter_in_no_row_is_refused_by_name(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.completions.create(model="base", prompt="hello", extra_body={"never_heard_of": 1})
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", "never_heard_of")
    assert not engine.requests


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/moderations", "/v1/realtime"])
def test_an_endpoint_that_is_refused_says_so_in_openais_shape(http: httpx.Client, path: str) -> None:
    response = http.post(path, json={})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
