"""Every parameter is understood, without effect, or refused by name."""

import json
from typing import Any

import pytest

from gateway.errors import GatewayError, InvalidRequestError
from gateway.openai_request import check_chat, check_completion, decode, sampling_of
from gateway.openai_schema import ChatFields, CompletionFields
from gateway.parameters import parameters_of

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> list[dict[str, Any]]:
    return check_chat(decode(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), ChatFields))


def completion(**fields: Any) -> list[str | list[int]]:
    return check_completion(
        decode(json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), CompletionFields)
    )


def refusal(**fields: Any) -> GatewayError:
    with pytest.raises(InvalidRequestError) as caught:
        (completion if "prompt" in fields else chat)(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("service_tier", "flex"),
        ("prompt_logprobs", 1),
        ("bad_words", ["x"]),
        ("length_penalty", True),
    ],
)
def test_what_would_change_the_output_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert name in error.message


def test_unknown_parameters_are_refused_by_name() -> None:
    error = refusal(guided_everything={"a": 1})
    assert (error.code, error.param) == ("unknown_parameter", "guided_everything")


def test_what_makes_no_difference_is_accepted() -> None:
    chat(
        user="me",
        metadata={"a": "b"},
        store=True,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        service_tier="auto",
        modalities=["text"],
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False, "future": 1},
    )
    completion(best_of=2, n=2, suffix=None)


@pytest.mark.parametrize("name", [*parameters_of(ChatFields), "never_heard_of"])
def test_null_is_as_good_as_absent(name: str) -> None:
    if name not in ("model", "messages"):
        chat(**{name: None})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": "1"}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**30}, "n"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"１": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a"] * 10_000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 1000}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0]",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "best_of": 3, "n": 2}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
    ],
)
def test_a_bad_value_is_refused_with_its_parameter(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


def test_messages_are_reduced_to_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": []},
    ]
    assert chat(messages=messages) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb", "name": "Ada"},
        {"role": "assistant", "content": ""},
    ]


def test_defaults_are_openais() -> None:
    fields = decode(b'{"model": "m", "prompt": "x"}', CompletionFields)
    sampling = sampling_of(fields, logprobs=None, prompt_logprobs=None)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 1.0, 0, None)


def test_long_quotes_are_cut() -> None:
    assert len(refusal(**{"x" * 10_000: 1}).message) < 200
