"""A client that leaves frees its sequences at once, whenever it leaves; over real sockets."""

import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer as HfTokenizer

from tests.gateway.conftest import Gateway, encode, wait_until
from tests.gateway.fake_engine import FakeEngine

CHAT = {
    "model": "base",
    "messages": [{"role": "user", "content": "hello world"}],
    "max_tokens": 150,
    "ignore_eos": True,
}
SOON_S = 0.5


def send(gateway: Gateway, body: dict) -> socket.socket:
    """A request written by hand, so that the test decides when the connection ends."""
    address = urlsplit(gateway.url)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def assert_all_aborted(engine: FakeEngine, left_at: float) -> None:
    wait_until(lambda: not engine.running)
    assert time.monotonic() - left_at < SOON_S
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_token_aborts(gateway: Gateway, engine: FakeEngine, stream: bool) -> None:
    engine.silent = True
    connection = send(gateway, {**CHAT, "stream": stream, "n": 2})
    wait_until(lambda: len(engine.running) == 2)
    with capture_logs() as lines:
        connection.close()
        assert_all_aborted(engine, time.monotonic())
        wait_until(lambda: lines)
    assert [line["status"] for line in lines] == [499]


def test_leaving_midstream_aborts(gateway: Gateway, engine: FakeEngine, hf_tokenizer: HfTokenizer) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, "the quick brown fox")
    engine.step_s = 0.02
    connection = send(gateway, {**CHAT, "stream": True})
    received = b""
    while received.count(b"data: ") < 4:
        received += connection.recv(65536)
    with capture_logs() as lines:
        connection.close()
        assert_all_aborted(engine, time.monotonic())
        wait_until(lambda: lines)
    assert lines[0]["status"] == 499
    assert 0 < lines[0]["completion_tokens"] < 150


def test_leaving_midway_through_an_unstreamed_answer_aborts(gateway: Gateway, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    connection = send(gateway, CHAT)
    wait_until(lambda: engine.running)
    time.sleep(0.1)
    connection.close()
    assert_all_aborted(engine, time.monotonic())


def test_a_client_that_reads_nothing_and_leaves_aborts(
    gateway: Gateway, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, "fox")
    engine.step_s = 0.001
    connection = send(gateway, {**CHAT, "stream": True, "n": 100, "max_tokens": 170})
    wait_until(lambda: len(engine.requests) == 100)
    time.sleep(0.1)
    connection.close()
    wait_until(lambda: not engine.running)


def test_many_who_leave_at_random_moments_leave_nothing_behind(gateway: Gateway, engine: FakeEngine) -> None:
    engine.step_s = 0.005
    connections = [send(gateway, {**CHAT, "stream": index % 2 == 0}) for index in range(40)]
    for index, connection in enumerate(connections):
        time.sleep(0.003 * (index % 5))
        connection.close()
    wait_until(lambda: not engine.running)
    # A connection closed before its request was read may never have reached the engine.
    assert set(engine.aborted) == {request.request_id for request in engine.requests}


def test_the_end_of_a_stream_aborts_nothing(gateway: Gateway, engine: FakeEngine) -> None:
    connection = send(gateway, {**CHAT, "stream": True, "max_tokens": 3})
    received = b""
    while b"[DONE]" not in received:
        received += connection.recv(65536)
    connection.close()
    wait_until(lambda: not engine.running)
    assert engine.aborted == []
