"""The official SDK works unchanged: sync, async, streaming, errors, headers."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import RejectCode, Rejected
from tests.gateway.conftest import Gateway, encode, wait_until
from tests.gateway.fake_engine import FakeEngine

MODEL = "base/shapes"


@pytest.fixture(autouse=True)
def fox(engine: FakeEngine, hf_tokenizer: HfTokenizer) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, "the quick brown fox 日本語")


@pytest.fixture
async def async_sdk(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_retrieved(sdk: openai.OpenAI) -> None:
    models = {model.id: model for model in sdk.models.list()}
    assert {"base", "base/shapes", "base/colours"} <= models.keys()
    assert sdk.models.retrieve("base/shapes") == models["base/shapes"]
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("base/none")


def test_chat(sdk: openai.OpenAI) -> None:
    chat = sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert chat.choices[0].message.content == "the quick brown fox 日本語"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage and chat.usage.prompt_tokens_details
    assert chat._request_id


def test_streamed_chat_with_usage(sdk: openai.OpenAI) -> None:
    text, usage = "", None
    for chunk in sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == "the quick brown fox 日本語"
    assert usage and usage.completion_tokens > 0


def test_the_stream_helper_accumulates(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], n=2, logprobs=True, top_logprobs=2
    ) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["the quick brown fox 日本語"] * 2
    logprobs = final.choices[0].logprobs
    assert logprobs and logprobs.content and len(logprobs.content[0].top_logprobs) == 2


def test_completions(sdk: openai.OpenAI) -> None:
    completion = sdk.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=50, logprobs=2, echo=True)
    assert [choice.text for choice in completion.choices] == [
        "athe quick brown fox 日本語",
        "bthe quick brown fox 日本語",
    ]
    logprobs = completion.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.text_offset
    texts = [
        chunk.choices[0].text
        for chunk in sdk.completions.create(model=MODEL, prompt=[5], stream=True, stop="fox")
    ]
    assert "".join(texts) == "the quick brown "


async def test_async_chats_side_by_side(async_sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.step_s = 0.002

    async def ask(model: str) -> str:
        stream = await async_sdk.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = await asyncio.gather(*(ask(model) for model in ("base", "base/shapes", "base/colours") * 10))
    assert set(texts) == {"the quick brown fox 日本語"}


async def test_leaving_an_async_stream_frees_the_engine(
    async_sdk: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.step_s = 0.01
    stream = await async_sdk.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        max_tokens=150,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await asyncio.to_thread(wait_until, lambda: not engine.running)
    assert len(engine.aborted) == 1


async def test_a_cancelled_call_frees_the_engine(async_sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.silent = True
    call = asyncio.create_task(
        async_sdk.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}])
    )
    await asyncio.to_thread(wait_until, lambda: engine.running)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: not engine.running)
    assert len(engine.aborted) == 1


def test_errors_are_the_sdks_classes(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    def create(**fields) -> None:
        sdk.chat.completions.create(
            **{"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
        )

    with pytest.raises(openai.NotFoundError) as not_found:
        create(model="gpt-4")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    assert not_found.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        create(temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(modalities=["text", "audio"])
    assert unsupported.value.code == "unsupported_parameter"
    for code, kind in (
        (RejectCode.OVERLOADED, openai.RateLimitError),
        (RejectCode.INTERNAL, openai.InternalServerError),
        (RejectCode.ADAPTER_NOT_FOUND, openai.NotFoundError),
    ):
        engine.reject = lambda request, code=code: Rejected(request.request_id, code, "no")
        with pytest.raises(kind):
            create()


def test_the_sdk_retries_an_overload_after_the_time_we_name(gateway: Gateway, engine: FakeEngine) -> None:
    answers = iter([RejectCode.OVERLOADED])

    def reject_once(request):
        code = next(answers, None)
        return Rejected(request.request_id, code, "full", 0.5) if code else None

    engine.reject = reject_once
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=1) as sdk:
        sdk.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}])
    assert len(engine.requests) == 2


def test_raw_responses_carry_headers(sdk: openai.OpenAI) -> None:
    raw = sdk.chat.completions.with_raw_response.create(
        model="base", messages=[{"role": "user", "content": "hi"}]
    )
    assert raw.headers["x-request-id"] == raw.parse()._request_id
    assert raw.headers["content-type"] == "application/json"
    with sdk.chat.completions.with_streaming_response.create(
        model="base", messages=[{"role": "user", "content": "hi"}], stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["cache-control"] == "no-cache"
        assert streamed.headers["x-request-id"]
        streamed.read()
