"""The engine dies, comes back, or talks nonsense: every caller hears of it in time, and the gateway goes on."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from engine.protocol import FinishReason, SequenceOutput, StepOutput, encode
from gateway.config import GatewayConfig, ModelConfig
from tests.gateway.conftest import Background, Gateway, wait_until
from tests.gateway.fake_engine import FakeEngine

CHAT = {
    "model": "base",
    "messages": [{"role": "user", "content": "hello world"}],
    "max_tokens": 150,
    "ignore_eos": True,
}


@pytest.fixture
def mortal(background: Background, session_engine: FakeEngine) -> Iterator[FakeEngine]:
    """An engine of the test's own, to be killed; not started."""
    engine = FakeEngine(session_engine.facts, session_engine.files)
    yield engine
    background.run(engine.kill())


@pytest.fixture
def own(background: Background, mortal: FakeEngine) -> Iterator[Gateway]:
    """A gateway before `mortal`, connected."""
    background.run(mortal.start())
    model = ModelConfig(name="base", engine=mortal.url)
    gateway = Gateway(background, GatewayConfig(models=(model,), request_timeout_s=2.5))
    gateway.wait_until_ready()
    yield gateway
    gateway.close()


def sdk_of(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)


def stream_of(sdk: openai.OpenAI, max_tokens: int = 150) -> openai.Stream[ChatCompletionChunk]:
    return sdk.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hello world"}],
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_a_kill_midstream_is_an_error_event_within_two_seconds(
    own: Gateway, mortal: FakeEngine, background: Background
) -> None:
    mortal.step_s = 0.01
    with sdk_of(own) as sdk:
        stream = stream_of(sdk)
        for _ in range(5):
            next(stream)
        background.run(mortal.kill())
        killed = time.monotonic()
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert time.monotonic() - killed < 2
        assert caught.value.code == "engine_unavailable"


def test_a_kill_before_the_first_token_is_503_within_two_seconds(
    own: Gateway, mortal: FakeEngine, background: Background
) -> None:
    mortal.silent = True
    statuses: list[int] = []

    def ask(stream: bool) -> None:
        response = httpx.post(
            own.url + "/v1/chat/completions", json={**CHAT, "stream": stream}, trust_env=False
        )
        statuses.append(response.status_code)

    threads = [threading.Thread(target=ask, args=(index % 2 == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(mortal.running) == 6)
    background.run(mortal.kill())
    for thread in threads:
        thread.join(2)
    assert statuses == [503] * 6


def test_a_restarted_engine_is_found_again(own: Gateway, mortal: FakeEngine, background: Background) -> None:
    background.run(mortal.kill())
    wait_until(lambda: httpx.get(own.url + "/readyz", trust_env=False).status_code == 503)
    response = httpx.post(own.url + "/v1/chat/completions", json=CHAT, trust_env=False)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    background.run(mortal.start())
    own.wait_until_ready()
    response = httpx.post(own.url + "/v1/chat/completions", json={**CHAT, "max_tokens": 3}, trust_env=False)
    assert response.json()["usage"]["completion_tokens"] == 3


def test_a_restart_with_other_files_brings_the_new_tokenizer(
    own: Gateway, mortal: FakeEngine, background: Background
) -> None:
    background.run(mortal.kill())
    config = json.dumps({"chat_template": "{{ messages[0]['content'] }}"}).encode()
    mortal.files = {**mortal.files, "tokenizer_config.json": config}
    mortal.facts = msgspec.structs.replace(mortal.facts, digest="2")
    background.run(mortal.start())
    own.wait_until_ready()
    body = {"model": "base", "messages": CHAT["messages"]}
    chat = httpx.post(own.url + "/tokenize", json=body, trust_env=False).json()
    plain = httpx.post(
        own.url + "/tokenize", json={"model": "base", "prompt": "hello world"}, trust_env=False
    ).json()
    assert chat == plain


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", b"nonsense", encode(StepOutput([]))[:-1], msgspec.msgpack.encode({"type": "unheard of"})],
)
def test_a_malformed_frame_ends_the_connection_and_only_that(
    own: Gateway, mortal: FakeEngine, background: Background, frame: bytes
) -> None:
    mortal.step_s = 0.01
    with sdk_of(own) as sdk:
        stream = stream_of(sdk)
        next(stream)
        background.run(mortal.send_raw(frame))
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        own.wait_until_ready()
        assert list(stream_of(sdk, max_tokens=2))


def test_output_for_unknown_requests_is_ignored(
    own: Gateway, mortal: FakeEngine, background: Background
) -> None:
    background.run(mortal.send_raw(encode(StepOutput([SequenceOutput("whose", [1], FinishReason.STOP)]))))
    with sdk_of(own) as sdk:
        assert list(stream_of(sdk, max_tokens=2))


def test_a_request_that_takes_too_long_is_aborted_and_told(own: Gateway, mortal: FakeEngine) -> None:
    mortal.silent = True
    response = httpx.post(own.url + "/v1/chat/completions", json=CHAT, trust_env=False, timeout=10)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "request_timeout"
    wait_until(lambda: mortal.aborted == [request.request_id for request in mortal.requests])


def test_a_gateway_starts_before_its_engine(background: Background, mortal: FakeEngine) -> None:
    background.run(mortal.start())
    background.run(mortal.kill())
    gateway = Gateway(background, GatewayConfig(models=(ModelConfig(name="base", engine=mortal.url),)))
    try:
        assert httpx.get(gateway.url + "/healthz", trust_env=False).status_code == 200
        assert httpx.get(gateway.url + "/readyz", trust_env=False).status_code == 503
        assert (
            httpx.get(gateway.url + "/v1/models", trust_env=False).json()["data"][0]["max_model_len"] is None
        )
        background.run(mortal.start())
        gateway.wait_until_ready()
    finally:
        gateway.close()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"nonsense"},
        {"tokenizer_config.json": b"["},
        {"tokenizer_config.json": b'{"chat_template": "{% if %}"}'},
        {"tokenizer_config.json": b'{"chat_template": [{"name": 1}]}'},
        {"tokenizer_config.json": b'{"chat_template": 5}'},
    ],
)
def test_unusable_tokenizer_files_leave_the_model_unready_and_the_gateway_alive(
    background: Background, mortal: FakeEngine, files: dict[str, bytes]
) -> None:
    good = mortal.files
    mortal.files = {**good, **files}
    background.run(mortal.start())
    gateway = Gateway(background, GatewayConfig(models=(ModelConfig(name="base", engine=mortal.url),)))
    try:
        time.sleep(0.2)
        response = httpx.post(gateway.url + "/v1/chat/completions", json=CHAT, trust_env=False)
        assert response.status_code == 503
        mortal.files = good
        gateway.wait_until_ready()
    finally:
        gateway.close()


def test_a_model_without_chat_template_says_so(background: Background, mortal: FakeEngine) -> None:
    mortal.files = {**mortal.files, "tokenizer_config.json": b"{}"}
    background.run(mortal.start())
    gateway = Gateway(background, GatewayConfig(models=(ModelConfig(name="base", engine=mortal.url),)))
    try:
        gateway.wait_until_ready()
        response = httpx.post(gateway.url + "/v1/chat/completions", json=CHAT, trust_env=False)
        assert response.status_code == 400
        assert "/v1/completions" in response.json()["error"]["message"]
    finally:
        gateway.close()


def test_stopping_the_gateway_finishes_open_requests(
    background: Background, mortal: FakeEngine, tmp_path: Path
) -> None:
    background.run(mortal.start())
    mortal.step_s = 0.01
    gateway = Gateway(background, GatewayConfig(models=(ModelConfig(name="base", engine=mortal.url),)))
    gateway.wait_until_ready()
    with sdk_of(gateway) as sdk:
        stream = stream_of(sdk, max_tokens=50)
        next(stream)
        gateway.close()
        chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    wait_until(lambda: not mortal.running)
