"""The Responses API through the official SDK: whole, streamed, stored, gone on from, with functions."""

from typing import Any

import openai
import pydantic
import pytest
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import RejectCode, Rejected
from tests.gateway.conftest import encode
from tests.gateway.fake_engine import FakeEngine

NOW: Any = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(autouse=True)
def fox(engine: FakeEngine, hf_tokenizer: HfTokenizer) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, "the quick brown fox 日本語")


def prompt_of(engine: FakeEngine, tokenizer: HfTokenizer) -> str:
    return tokenizer.decode(engine.requests[-1].prompt, skip_special_tokens=False)


def test_text_in_text_out(sdk: openai.OpenAI, engine: FakeEngine, hf_tokenizer: HfTokenizer) -> None:
    made = sdk.responses.create(model="base/shapes", input="hi", instructions="be kind", metadata={"a": "b"})
    assert made.output_text == "the quick brown fox 日本語"
    assert (made.status, made.metadata, made.object) == ("completed", {"a": "b"}, "response")
    assert made.usage and made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert "system\nbe kind" in prompt_of(engine, hf_tokenizer)


def test_events_come_in_the_order_of_the_sdk(sdk: openai.OpenAI) -> None:
    events = list(sdk.responses.create(model="base", input="hi", stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with sdk.responses.stream(model="base", input="hi", store=False) as stream:
        final = stream.get_final_response()
    assert final.output_text == "the quick brown fox 日本語" and final.usage


def test_a_response_is_stored_read_gone_on_from_and_forgotten(
    sdk: openai.OpenAI, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    first = sdk.responses.create(model="base", input="one", instructions="only once")
    assert sdk.responses.retrieve(first.id).output_text == first.output_text
    second = sdk.responses.create(
        model="base", input=[{"role": "user", "content": "two"}], previous_response_id=first.id
    )
    prompt = prompt_of(engine, hf_tokenizer)
    assert prompt.index("user\none") < prompt.index("assistant\nthe quick") < prompt.index("user\ntwo")
    assert "only once" not in prompt, "instructions are not carried over"
    assert second.previous_response_id == first.id
    items = list(sdk.responses.input_items.list(second.id))
    assert len(items) == 1 and items[0].id
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        sdk.responses.cancel(first.id)
    sdk.responses.delete(first.id)
    for gone in (sdk.responses.retrieve, sdk.responses.delete):
        with pytest.raises(openai.NotFoundError):
            gone(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.responses.create(model="base", input="three", previous_response_id=second.id)
    assert refused.value.code == "previous_response_not_found"


def test_what_shall_not_be_stored_is_not(sdk: openai.OpenAI) -> None:
    made = sdk.responses.create(model="base", input="one", store=False)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(made.id)


def test_input_items_are_paged(sdk: openai.OpenAI) -> None:
    texts = ["a", "b", "c"]
    given: Any = [{"role": "user", "content": text} for text in texts]
    made = sdk.responses.create(model="base", input=given)
    for order, expected in (("asc", texts), ("desc", texts[::-1])):
        pages: Any = sdk.responses.input_items.list(made.id, order=order, limit=2)  # type: ignore[arg-type]
        assert pages.has_more
        assert [item.content for item in pages] == expected


def test_an_answer_cut_off_is_incomplete(sdk: openai.OpenAI) -> None:
    made = sdk.responses.create(model="base", input="hi", max_output_tokens=3)
    assert made.status == "incomplete"
    assert made.incomplete_details and made.incomplete_details.reason == "max_output_tokens"
    assert (
        list(sdk.responses.create(model="base", input="hi", max_output_tokens=3, stream=True))[-1].type
        == "response.incomplete"
    )


def test_a_format_is_parsed_by_the_sdk(
    sdk: openai.OpenAI, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    class Animal(pydantic.BaseModel):
        name: str

    engine.reply = lambda request: encode(hf_tokenizer, '{"name": "fox"}')
    made = sdk.responses.parse(model="base", input="hi", text_format=Animal)
    assert made.output_parsed == Animal(name="fox")
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None and grammar.kind == "json_schema"


def test_logprobs_are_on_request(sdk: openai.OpenAI) -> None:
    made: Any = sdk.responses.create(
        model="base", input="hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = made.output[0].content[0].logprobs
    assert (
        "".join(token.token for token in logprobs).startswith("the quick")
        and len(logprobs[0].top_logprobs) == 2
    )


def test_a_lost_engine_is_a_failed_response(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reject = lambda request: Rejected(request.request_id, RejectCode.OVERLOADED, "full")
    with pytest.raises(openai.RateLimitError):
        sdk.responses.create(model="base", input="hi", stream=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0]"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "input"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [NOW]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)
def test_what_is_malformed_is_refused_with_its_parameter(
    sdk: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.post("/responses", cast_to=object, body={"model": "base", "input": "hi", **fields})
    assert refused.value.param == param
