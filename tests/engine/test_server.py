"""The engine's HTTP edge, driven as a gateway would."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from engine.config import EngineConfig
from engine.fake_runner import FakeRunner
from engine.loop import EngineLoop, ModelLimits
from engine.protocol import (
    ADAPTERS_PATH,
    FACTS_PATH,
    FILES_PATH,
    PIN_PATH,
    UNPIN_PATH,
    WIRE_PATH,
    Abort,
    AdapterRef,
    AdapterReport,
    EngineStatus,
    Generate,
    ModelFacts,
    Rejected,
    SamplingParams,
    StepOutput,
    decode_from_engine,
    encode,
)
from engine.server import EngineServer

FACTS = ModelFacts("fake", "nowhere", 512, 1000, [2], "float32", ["tokenizer.json"], "abc")


def refuse(ref):
    raise AssertionError("no adapters here")


class Edge:
    def __init__(self, client: TestClient, engine: EngineLoop):
        self.client, self.engine = client, engine


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    server = EngineServer()
    engine = EngineLoop(
        FakeRunner(64, 16, step_s=0.005),
        EngineConfig(model="none", name="fake"),
        ModelLimits(1000, 512, (2,)),
        server.deliver,
        read_adapter=refuse,
        version_of=lambda ref: 0,
        device_bytes=lambda adapter: 0,
    )
    engine.start()
    server.attach(engine, FACTS, {"tokenizer.json": b"{}"})
    async with TestClient(TestServer(server.app)) as client:
        yield Edge(client, engine)
    await asyncio.to_thread(engine.stop)


def request(request_id: str, count: int = 5) -> bytes:
    return encode(Generate(request_id, [5, 6, 7], SamplingParams(count, temperature=0.0, ignore_eos=True)))


async def collect(socket, request_id: str) -> list[int]:
    tokens: list[int] = []
    async for message in socket:
        found = decode_from_engine(message.data)
        if isinstance(found, StepOutput):
            for output in found.outputs:
                if output.request_id == request_id:
                    tokens += output.token_ids
                    if output.finish_reason:
                        return tokens
    raise AssertionError("the socket closed first")


async def eventually(claim: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


async def eventually_idle(engine: EngineLoop) -> bool:
    def is_idle() -> bool:
        status = engine.status()
        return status.running == status.waiting == 0 and status.kv_blocks_free == status.kv_blocks_total

    return await eventually(is_idle, 1.0)


async def test_the_first_frame_is_the_status_and_tokens_come_back(edge):
    async with edge.client.ws_connect(WIRE_PATH) as socket:
        assert isinstance(decode_from_engine((await socket.receive()).data), EngineStatus)
        await socket.send_bytes(request("a"))
        assert len(await collect(socket, "a")) == 5


async def test_one_frame_per_step_carries_every_request(edge):
    async with edge.client.ws_connect(WIRE_PATH) as socket:
        for name in "abc":
            await socket.send_bytes(request(name, 30))
        most = 0
        async for message in socket:
            found = decode_from_engine(message.data)
            if isinstance(found, StepOutput):
                most = max(most, len(found.outputs))
                if any(output.finish_reason for output in found.outputs):
                    break
        assert most == 3


async def test_a_malformed_frame_closes_that_connection_with_the_reason_and_no_other(edge):
    async with edge.client.ws_connect(WIRE_PATH) as good, edge.client.ws_connect(WIRE_PATH) as bad:
        await bad.send_bytes(request("x", 400))
        await bad.send_bytes(b"\xc1 nonsense")
        while (message := await bad.receive()).type is WSMsgType.BINARY:
            pass
        assert message.type is WSMsgType.CLOSE and "malformed" in message.extra
        await good.send_bytes(request("a"))
        assert len(await collect(good, "a")) == 5
        assert await eventually_idle(edge.engine)


async def test_closing_the_socket_aborts_its_requests(edge):
    async with edge.client.ws_connect(WIRE_PATH) as socket:
        for name in "abc":
            await socket.send_bytes(request(name, 400))
        while not isinstance(decode_from_engine((await socket.receive()).data), StepOutput):
            pass
    assert await eventually_idle(edge.engine)


async def test_abort_over_the_wire(edge):
    async with edge.client.ws_connect(WIRE_PATH) as socket:
        await socket.send_bytes(request("a", 400))
        await socket.send_bytes(encode(Abort("a")))
        assert await eventually_idle(edge.engine)


async def test_a_refusal_comes_as_a_message(edge):
    async with edge.client.ws_connect(WIRE_PATH) as socket:
        await socket.send_bytes(encode(Generate("a", [], SamplingParams(5))))
        await socket.receive()
        found = decode_from_engine((await socket.receive()).data)
        assert isinstance(found, Rejected) and found.request_id == "a"


async def test_facts_files_health_and_metrics(edge):
    response = await edge.client.get(FACTS_PATH)
    assert msgspec.json.decode(await response.read(), type=ModelFacts) == FACTS
    response = await edge.client.get(f"{FILES_PATH}/tokenizer.json")
    assert await response.read() == b"{}"
    etag = response.headers["ETag"]
    response = await edge.client.get(f"{FILES_PATH}/tokenizer.json", headers={"If-None-Match": etag})
    assert response.status == 304
    assert (await edge.client.get(f"{FILES_PATH}/secrets")).status == 404
    assert (await edge.client.get("/healthz")).status == 200
    assert (await edge.client.get("/readyz")).status == 200
    assert "loraland_engine_running_sequences" in await (await edge.client.get("/metrics")).text()
    report = msgspec.json.decode(await (await edge.client.get(ADAPTERS_PATH)).read(), type=AdapterReport)
    assert report.slots == 64 and report.adapters == []


async def test_pinning_takes_an_adapter_and_says_what_is_wrong_with_a_body(edge):
    body = msgspec.json.encode(AdapterRef("fake/a", "/adapters/a"))
    assert (await edge.client.post(PIN_PATH, data=body)).status == 202
    assert await eventually(lambda: edge.engine.residency.num_pins == 1)
    assert (await edge.client.post(UNPIN_PATH, data=body)).status == 202
    assert await eventually(lambda: edge.engine.residency.num_pins == 0)
    refused = await edge.client.post(PIN_PATH, data=b'{"name": 1}')
    assert refused.status == 400 and "uri" in (await refused.json())["error"]


async def test_before_the_model_is_loaded_it_is_alive_but_not_ready():
    async with TestClient(TestServer(EngineServer().app)) as client:
        assert (await client.get("/healthz")).status == 200
        for path in ("/readyz", FACTS_PATH, WIRE_PATH, ADAPTERS_PATH, "/metrics"):
            response = await client.get(path)
            assert response.status == 503 and response.headers["Retry-After"] == "1"


class Deaf:
    """A gateway that asks for a lot and never reads: a small receive buffer, full at once."""

    def __init__(self, client: TestClient, requests: int):
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((client.host, client.port))
        self._socket.sendall(
            f"GET {WIRE_PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        sampling = SamplingParams(40_000, temperature=0.0, ignore_eos=True, logprobs=20)
        for number in range(requests):
            frame = encode(Generate(str(number), [5, 6, 7], sampling))
            header = bytes([0x82, 0x80 | 126]) + len(frame).to_bytes(2, "big") + bytes(4)
            self._socket.sendall(header + frame)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
async def roomy(monkeypatch) -> AsyncIterator[tuple[TestClient, EngineServer, EngineLoop]]:
    """An engine with room for long answers and none for unread ones."""
    monkeypatch.setattr("engine.server.MAX_BACKLOG_BYTES", 200_000)
    server = EngineServer()
    engine = EngineLoop(
        FakeRunner(4096, 16, step_s=0.0005),
        EngineConfig(model="none", name="fake"),
        ModelLimits(100_000, 60_000, (2,)),
        server.deliver,
        read_adapter=refuse,
        version_of=lambda ref: 0,
        device_bytes=lambda adapter: 0,
    )
    engine.start()
    server.attach(engine, FACTS, {})
    async with TestClient(TestServer(server.app)) as client:
        yield client, server, engine
    await asyncio.to_thread(engine.stop)


async def test_a_gateway_that_does_not_read_is_cut_off_and_its_requests_are_freed(roomy):
    client, server, engine = roomy
    async with client.ws_connect(WIRE_PATH) as good:
        deaf = Deaf(client, 8)
        assert await eventually(lambda: engine.status().running == 8)
        assert await eventually(lambda: len(server._connections) == 1)
        assert await eventually_idle(engine), "what it asked for is still being computed"
        await good.send_bytes(request("a"))
        assert len(await collect(good, "a")) == 5
        deaf.close()


def test_the_edge_loads_without_torch():
    code = "import sys, engine.server, engine.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
