"""A model that is not ours, through the official SDK and a server with bad manners: each fault is an OpenAI error."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from gateway.breaker import Breaker
from gateway.config import GatewayConfig, UpstreamConfig, UpstreamModelConfig
from tests.gateway.conftest import Background, Gateway, wait_until
from tests.gateway.fake_upstream import (
    USAGE,
    WORDS,
    FakeUpstream,
    Reply,
    answer,
    chat_events,
    half_a_body,
    refuse,
    reset,
    silence,
)

TEXT = "".join(WORDS)
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
SOON_S = 0.5
Start = Callable[..., openai.OpenAI]


def answered(lines: list[Any]) -> list[Any]:
    """The log lines of requests; other parts of the gateway log meanwhile."""
    return [line for line in lines if line["event"] == "request"]


@pytest.fixture
def upstream(background: Background) -> Iterator[FakeUpstream]:
    upstream = FakeUpstream()
    background.run(upstream.start())
    yield upstream
    background.run(upstream.stop())


@pytest.fixture
def start(
    background: Background, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Gateway]]:
    """Starts a gateway before the upstream, with the given settings of it."""
    monkeypatch.setenv("UPSTREAM_KEY", "sk-ours")
    started: list[Gateway] = []

    def start(**settings: Any) -> Gateway:
        models = (
            UpstreamModelConfig(name="same"),
            UpstreamModelConfig(
                name="gpt-4", remote="gpt-4-0613", input_usd_per_million=30, output_usd_per_million=60
            ),
        )
        timeouts = {"first_byte_timeout_s": 0.3, "idle_timeout_s": 0.3, "max_retry_wait_s": 1.0}
        given = {"url": upstream.url, **timeouts, **settings}
        config = UpstreamConfig(name="far", models=models, api_key_env="UPSTREAM_KEY", **given)
        started.append(Gateway(background, GatewayConfig(upstreams=(config,), request_timeout_s=1)))
        return started[-1]

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture
def gateway(start: Callable[..., Gateway]) -> Gateway:
    return start()


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="sk-theirs", max_retries=0) as client:
        yield client


def ask(sdk: openai.OpenAI, model: str = "same") -> str | None:
    return sdk.chat.completions.create(model=model, messages=MESSAGES).choices[0].message.content


def read(sdk: openai.OpenAI, model: str = "same") -> str:
    stream = sdk.chat.completions.create(model=model, messages=MESSAGES, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def post(gateway: Gateway, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": MESSAGES, **more}
    return httpx.post(gateway.url + "/v1/chat/completions", json=body, trust_env=False, timeout=10)


def test_chat_streamed_and_not(sdk: openai.OpenAI) -> None:
    assert ask(sdk) == read(sdk) == TEXT


def test_the_upstream_gets_its_own_key_and_the_request_as_it_was(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    body = b'{"model":  "same", "messages": [], "unheard_of": 1.50}'
    headers = {"authorization": "Bearer sk-theirs", "x-request-id": "mine", "cookie": "a=b"}
    httpx.post(gateway.url + "/v1/chat/completions", content=body, headers=headers, trust_env=False)
    path, seen = upstream.heads[0]
    assert upstream.bodies == [body]
    assert path == "/v1/chat/completions"
    assert seen["authorization"] == "Bearer sk-ours"
    assert seen["x-request-id"] == "mine"
    assert "cookie" not in seen


def test_a_streams_bytes_pass_unchanged(gateway: Gateway, upstream: FakeUpstream) -> None:
    received = post(gateway, "same", stream=True)
    assert received.content == upstream.sent
    assert b"\r\n" in received.content and b": a comment" in received.content
    assert received.headers["x-loraland-model"] == "same"


def test_bytes_pass_unchanged_however_they_are_cut(gateway: Gateway, upstream: FakeUpstream) -> None:
    whole = b"".join(chat_events({"model": "same"}))
    pieces = [whole[at : at + 7] for at in range(0, len(whole), 7)]
    upstream.replies = [upstream.stream(pieces, gap_s=0.001)]
    assert post(gateway, "same", stream=True).content == whole


def test_another_name_is_translated_both_ways_and_nothing_else(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    received = post(gateway, "gpt-4", stream=True, stream_options={"include_usage": True})
    assert upstream.asked[0]["model"] == "gpt-4-0613"
    events = [line[5:] for line in received.content.splitlines() if line.startswith(b"data:")]
    sent = [line[5:] for line in upstream.sent.splitlines() if line.startswith(b"data:")]
    assert [json.loads(event) for event in events[:-1]] == [
        {**json.loads(event), "model": "gpt-4"} for event in sent[:-1]
    ]
    assert b'"x":1.5' in received.content
    whole = post(gateway, "gpt-4").json()
    assert (whole["model"], whole["system_fingerprint"]) == ("gpt-4", "fp_é")


def test_a_priced_stream_is_counted_though_nobody_asked(
    sdk: openai.OpenAI, gateway: Gateway, upstream: FakeUpstream
) -> None:
    with capture_logs() as lines:
        received = post(gateway, "gpt-4", stream=True)
        wait_until(lambda: answered(lines))
    assert upstream.asked[0]["stream_options"] == {"include_usage": True}
    assert b"usage" not in received.content and b"[DONE]" in received.content
    (line,) = answered(lines)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (1000, 100)
    assert line["cost_usd"] == pytest.approx(0.036)
    ask(sdk, "gpt-4")
    text = httpx.get(gateway.url + "/metrics", trust_env=False).text
    assert 'loraland_gateway_cost_usd_total{model="gpt-4"} 0.072' in text


def test_completions_embeddings_and_responses_pass(sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
    choice = {"index": 0, "text": "hi", "finish_reason": "stop", "logprobs": None}
    completion = {"id": "c", "object": "text_completion", "created": 1, "model": "x", "choices": [choice]}
    vectors = {
        "object": "list",
        "model": "gpt-4-0613",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
    }
    response = {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": "same",
        "output": [],
        "error": None,
    }
    upstream.replies = [
        answer(json.dumps(each)) for each in (completion, {**vectors, "usage": USAGE}, response)
    ]
    assert sdk.completions.create(model="same", prompt="a").choices[0].text == "hi"
    embedded = sdk.embeddings.create(model="gpt-4", input="a", encoding_format="float")
    assert (embedded.model, embedded.data[0].embedding) == ("gpt-4", [0.5])
    assert sdk.responses.create(model="same", input="a").id == "r"
    assert [path for path, _ in upstream.heads] == ["/v1/completions", "/v1/embeddings", "/v1/responses"]


def response_events(*, whole: bool) -> list[bytes]:
    response = {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": "gpt-4-0613",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    usage = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
    events = [{"type": "response.created", "sequence_number": 0, "response": response}]
    if whole:
        done = {**response, "usage": usage}
        events.append({"type": "response.completed", "sequence_number": 1, "response": done})
    return [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in events]


def test_a_streamed_response_is_renamed_and_counted(sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.replies = [upstream.stream(response_events(whole=True))]
    with capture_logs() as lines:
        events: list[Any] = list(sdk.responses.create(model="gpt-4", input="a", stream=True))
        wait_until(lambda: answered(lines))
    assert [event.type for event in events] == ["response.created", "response.completed"]
    assert events[-1].response.model == "gpt-4"
    assert answered(lines)[-1]["cost_usd"] == pytest.approx(0.036)


def test_a_streamed_response_that_breaks_ends_with_an_error_event(
    sdk: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.replies = [upstream.stream(response_events(whole=False), then="die")]
    events: list[Any] = list(sdk.responses.create(model="gpt-4", input="a", stream=True))
    assert [event.type for event in events] == ["response.created", "error"]
    assert events[-1].code == "upstream_unreachable"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault", [reset, half_a_body, refuse(500), refuse(503), refuse(429, retry_after="0")]
)
def test_what_passes_by_itself_is_tried_again(
    sdk: openai.OpenAI, upstream: FakeUpstream, fault: Reply, stream: bool
) -> None:
    if stream and fault is half_a_body:
        fault = upstream.stream([b": comment\n\ndata: {"], then="die")
    upstream.replies = [fault, fault]
    assert (read if stream else ask)(sdk) == TEXT
    assert len(upstream.bodies) == 3


def test_retry_after_is_respected(sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.replies = [
        refuse(429, retry_after_ms="300"),
        refuse(503, retry_after=formatdate(0, usegmt=True)),
    ]
    began = time.monotonic()
    assert ask(sdk) == TEXT
    assert 0.3 <= time.monotonic() - began < 0.6


def test_a_long_retry_after_is_the_clients_to_respect(sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.replies = [refuse(429, retry_after="77")]
    with pytest.raises(openai.RateLimitError) as caught:
        ask(sdk)
    assert caught.value.response.headers["retry-after"] == "77"
    assert (caught.value.code, caught.value.type, caught.value.param) == (
        "said_code",
        "said_type",
        "said_param",
    )
    assert len(upstream.bodies) == 1


QUOTA = {
    "error": {"message": "broke", "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}
}


@pytest.mark.parametrize(
    ("fault", "raised", "code"),
    [
        (refuse(400), openai.BadRequestError, "said_code"),
        (refuse(404), openai.NotFoundError, "said_code"),
        (
            refuse(422, {"error": "too long", "error_type": "validation"}),
            openai.UnprocessableEntityError,
            "validation",
        ),
        (refuse(400, {"object": "error", "message": "vLLM's", "code": 400}), openai.BadRequestError, "400"),
        (refuse(404, {"detail": "Not Found"}), openai.NotFoundError, "upstream_error"),
        (refuse(429, QUOTA), openai.RateLimitError, "insufficient_quota"),
        (refuse(500, x_should_retry="false"), openai.InternalServerError, "said_code"),
        (refuse(401), openai.InternalServerError, "upstream_refused_key"),
        (answer("<html>", "text/html"), openai.InternalServerError, "upstream_invalid_response"),
        (answer('{"id": '), openai.InternalServerError, "upstream_invalid_response"),
        (answer("[]"), openai.InternalServerError, "upstream_invalid_response"),
        (answer("", status=307), openai.InternalServerError, "upstream_invalid_response"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    sdk: openai.OpenAI,
    upstream: FakeUpstream,
    fault: Reply,
    raised: type[openai.APIStatusError],
    code: str | None,
) -> None:
    upstream.replies = [fault]
    with pytest.raises(raised) as caught:
        ask(sdk)
    assert caught.value.code == code
    assert isinstance(caught.value.body, dict) and set(caught.value.body) == {
        "message",
        "type",
        "param",
        "code",
    }
    assert "sk-ours" not in str(caught.value)
    assert len(upstream.bodies) == 1


def test_a_json_body_for_a_stream_is_no_stream(sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.replies = [answer("{}")]
    with pytest.raises(openai.InternalServerError, match="event stream"):
        read(sdk)


@pytest.mark.parametrize("stream", [False, True])
def test_silence_ends_with_504(sdk: openai.OpenAI, upstream: FakeUpstream, stream: bool) -> None:
    upstream.replies = [silence]
    with pytest.raises(openai.InternalServerError) as caught:
        (read if stream else ask)(sdk)
    assert caught.value.status_code == 504
    assert caught.value.code == ("upstream_timeout" if stream else "request_timeout")
    wait_until(lambda: upstream.left == 1)


def test_an_error_in_the_first_event_is_an_http_error(sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
    event = b'data: {"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": "bad"}}\n\n'
    upstream.replies = [upstream.stream([b": hm\n\n", event])]
    with pytest.raises(openai.BadRequestError, match="no"):
        read(sdk)
    assert len(upstream.bodies) == 1


BEGINNING = chat_events({"model": "same"})[:3]


@pytest.mark.parametrize(
    ("rest", "then", "words"),
    [
        ([], "die", "connection"),
        ([], "stall", "sent nothing"),
        ([], "end", "middle"),
        ([b'data: {"half": '], "end", "middle"),
        ([b'data: {"half": \n\n'], "end", "JSON"),
        ([b'data: {"error": {"message": "tired", "type": "server_error"}}\n\n'], "end", "tired"),
        ([b'data: {"error": "weary", "error_type": "generation"}\n\n'], "end", "weary"),
    ],
)
def test_a_break_in_midstream_is_one_error_event_after_what_came(
    gateway: Gateway, sdk: openai.OpenAI, upstream: FakeUpstream, rest: list[bytes], then: str, words: str
) -> None:
    broken = upstream.stream([*BEGINNING, *rest], then=then)
    upstream.replies = [broken, broken]
    text = ""
    with capture_logs() as lines:
        with pytest.raises(openai.APIError, match=words):
            for chunk in sdk.chat.completions.create(model="same", messages=MESSAGES, stream=True):
                text += chunk.choices[0].delta.content or ""
        wait_until(lambda: answered(lines))
    assert text == "the quick "
    assert [line["error"] for line in answered(lines)] != [None]
    received = post(gateway, "same", stream=True).content
    assert received.startswith(b"".join(BEGINNING))
    assert received.count(b'"error"') == 1 and b"half" not in received and received.endswith(b"\n\n")
    assert len(upstream.bodies) == 2


def test_an_unreachable_upstream_is_a_502(start: Callable[..., Gateway]) -> None:
    received = post(start(url="http://127.0.0.1:1/v1", retries=1), "same")
    assert (received.status_code, received.json()["error"]["code"]) == (502, "upstream_unreachable")
    assert "127.0.0.1" not in received.text


def test_the_circuit_opens_and_one_probe_closes_it(
    start: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = start(retries=0, breaker_failures=2, breaker_pause_s=0.3)
    upstream.replies = [refuse(500), refuse(429), refuse(500), refuse(500), refuse(500)]
    statuses = [post(gateway, "same").status_code for _ in range(5)]
    assert statuses == [500, 429, 500, 500, 503]
    refused = post(gateway, "same")
    assert refused.json()["error"]["code"] == "upstream_unavailable"
    assert refused.headers["retry-after"] == "1"
    assert len(upstream.bodies) == 4
    metrics = httpx.get(gateway.url + "/metrics", trust_env=False).text
    assert 'loraland_gateway_upstream_open{upstream="far"} 1.0' in metrics
    time.sleep(0.3)
    assert [post(gateway, "same").status_code for _ in range(2)] == [500, 503]
    time.sleep(0.3)
    assert [post(gateway, "same").status_code for _ in range(3)] == [200, 200, 200]


def test_streams_that_always_break_open_the_circuit(
    start: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = start(breaker_failures=2)
    upstream.replies = [upstream.stream(BEGINNING, then="die")] * 2
    assert [post(gateway, "same", stream=True).status_code for _ in range(3)] == [200, 200, 503]


def test_a_half_open_circuit_lets_one_through_at_a_time() -> None:
    breaker = Breaker(limit=1, pause_s=10)
    breaker.failed(now=0)
    assert breaker.refusal_s(4) == 6
    assert breaker.refusal_s(10) is None
    assert breaker.refusal_s(11) == 10
    breaker.abandoned()
    assert breaker.refusal_s(12) is None
    breaker.answered()
    assert breaker.refusal_s(12) is None
    breaker.failed(13)
    assert breaker.refusal_s(14) == 9


def test_a_probe_whose_client_leaves_gives_its_turn_back(
    start: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = start(retries=0, breaker_failures=1, breaker_pause_s=0.1)
    upstream.replies = [refuse(500), silence]
    assert post(gateway, "same").status_code == 500
    time.sleep(0.1)
    connection = send(gateway, stream=False)
    wait_until(lambda: len(upstream.bodies) == 2)
    connection.close()
    wait_until(lambda: upstream.left == 1)
    assert post(gateway, "same").status_code == 200


def send(gateway: Gateway, *, stream: bool) -> socket.socket:
    """A request written by hand, so that the test decides when the connection ends."""
    address = urlsplit(gateway.url)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    data = json.dumps({"model": "same", "messages": MESSAGES, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_answer_ends_the_upstreams_connection(
    start: Callable[..., Gateway], upstream: FakeUpstream, stream: bool
) -> None:
    gateway = start(first_byte_timeout_s=20)
    upstream.replies = [silence]
    connection = send(gateway, stream=stream)
    wait_until(lambda: upstream.bodies)
    with capture_logs() as lines:
        left_at = time.monotonic()
        connection.close()
        wait_until(lambda: upstream.left == 1)
        assert time.monotonic() - left_at < SOON_S
        wait_until(lambda: answered(lines))
    assert [line["status"] for line in answered(lines)] == [499]


def test_a_client_that_leaves_in_midstream_ends_the_upstreams_connection(
    start: Callable[..., Gateway], upstream: FakeUpstream
) -> None:
    gateway = start(idle_timeout_s=20)
    upstream.replies = [upstream.stream(BEGINNING, then="stall")]
    connection = send(gateway, stream=True)
    received = b""
    while b"quick" not in received:
        received += connection.recv(65536)
    left_at = time.monotonic()
    connection.close()
    wait_until(lambda: upstream.left == 1)
    assert time.monotonic() - left_at < SOON_S


def test_upstreams_models_are_listed(sdk: openai.OpenAI) -> None:
    cards = {card.id: card for card in sdk.models.list()}
    assert set(cards) == {"same", "gpt-4"}
    assert cards["gpt-4"].owned_by == "far"
    assert sdk.models.retrieve("gpt-4") == cards["gpt-4"]
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError):
        ask(sdk, "gpt-5")


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings", "responses"])
def test_a_body_that_is_no_request_is_refused(gateway: Gateway, path: str, upstream: FakeUpstream) -> None:
    for body in (b"", b"{", b"[]", b'{"model": 1}', b'{"model": "\xff"}'):
        received = httpx.post(f"{gateway.url}/v1/{path}", content=body, trust_env=False)
        assert received.status_code == 400 and received.json()["error"]["type"] == "invalid_request_error"
    assert upstream.bodies == []
