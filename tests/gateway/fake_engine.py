"""An engine without a model that speaks `engine.protocol`, and breaks when told to. Knows no text."""

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from aiohttp import WSMsgType, web

from engine.protocol import (
    ADAPTERS_PATH,
    FACTS_PATH,
    FILES_PATH,
    WIRE_PATH,
    Abort,
    AdapterReport,
    EngineStatus,
    FinishReason,
    Generate,
    ModelFacts,
    Rejected,
    SequenceOutput,
    StepOutput,
    TokenLogprobs,
    decode_to_engine,
    encode,
)


@dataclass
class Running:
    request: Generate
    reply: list[int]
    sent: int = 0


@dataclass
class Connection:
    socket: web.WebSocketResponse
    running: dict[str, Running] = field(default_factory=dict)


class FakeEngine:
    """Answers every request with `reply(request)`, a token a step. Everything runs on the loop of `start`."""

    def __init__(self, facts: ModelFacts, files: dict[str, bytes]) -> None:
        self.facts, self.files = facts, files
        self.port = 0
        self.reset()
        self._connections: list[Connection] = []
        self._runner: web.AppRunner | None = None

    def reset(self) -> None:
        self.reply: Callable[[Generate], list[int]] = lambda request: request.prompt
        """Tokens of the answer; then the sequence stops, or with ignore_eos begins anew."""
        self.reject: Callable[[Generate], Rejected | None] = lambda request: None
        self.step_s = 0.0
        self.tokens_per_step = 1
        self.silent = False
        """Accept requests but make no tokens."""
        self.cached_tokens = 0
        self.report = AdapterReport(2, 0, 0, 2**20, 0, 0, 2**20, 0, [])
        self.requests: list[Generate] = []
        self.aborted: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> list[str]:
        return [request_id for connection in self._connections for request_id in connection.running]

    async def start(self) -> None:
        """Listen, on the port of last time if there was one."""
        app = web.Application(client_max_size=2**26)
        app.router.add_get(FACTS_PATH, self._facts)
        app.router.add_get(FILES_PATH + "/{name}", self._file)
        app.router.add_get(ADAPTERS_PATH, self._adapters)
        app.router.add_get(WIRE_PATH, self._wire)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Die as a process does: every socket is gone at once, nobody says goodbye."""
        for connection in self._connections:
            transport = connection.socket._req.transport if connection.socket._req else None
            if transport is not None:
                transport.abort()
        self._connections.clear()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def send_raw(self, frame: bytes) -> None:
        """Send bytes as they are to every gateway."""
        for connection in self._connections:
            await connection.socket.send_bytes(frame)

    async def _facts(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.facts), content_type="application/json")

    async def _file(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["name"]])

    async def _adapters(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.report), content_type="application/json")

    async def _wire(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=2**26)
        await socket.prepare(request)
        connection = Connection(socket)
        self._connections.append(connection)
        stepper = asyncio.create_task(self._step_forever(connection))
        try:
            await socket.send_bytes(encode(self._status(connection)))
            async for message in socket:
                assert message.type is WSMsgType.BINARY
                await self._receive(connection, decode_to_engine(message.data))
        finally:
            stepper.cancel()
            await asyncio.gather(stepper, return_exceptions=True)
            if connection in self._connections:
                self._connections.remove(connection)
        return socket

    async def _receive(self, connection: Connection, message: Generate | Abort) -> None:
        if isinstance(message, Abort):
            self.aborted.append(message.request_id)
            connection.running.pop(message.request_id, None)
            return
        self.requests.append(message)
        if (rejected := self.reject(message)) is not None:
            await connection.socket.send_bytes(encode(rejected))
            return
        connection.running[message.request_id] = Running(message, self.reply(message))

    async def _step_forever(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self.silent or not connection.running:
                await asyncio.sleep(0.001)
                continue
            outputs = [self._advance_far(running) for running in connection.running.values()]
            for output in outputs:
                if output.finish_reason is not None:
                    del connection.running[output.request_id]
            await connection.socket.send_bytes(encode(StepOutput(outputs)))

    def _advance_far(self, running: Running) -> SequenceOutput:
        """Several tokens at once, as after guesses that were right."""
        made = self._advance(running)
        for _ in range(self.tokens_per_step - 1):
            if made.finish_reason is not None:
                break
            more = self._advance(running)
            made = msgspec.structs.replace(
                made,
                token_ids=made.token_ids + more.token_ids,
                finish_reason=more.finish_reason,
                logprobs=None if made.logprobs is None else made.logprobs + (more.logprobs or []),
            )
        return made

    def _advance(self, running: Running) -> SequenceOutput:
        request, sampling, reply = running.request, running.request.sampling, running.reply
        if request.pooling is not None:
            vector = array("f", [len(request.prompt), request.prompt[-1], request.pooling == "mean"])
            return SequenceOutput(request.request_id, [], FinishReason.STOP, embedding=vector.tobytes())
        first = running.sent == 0
        prompt_logprobs = None
        if first and sampling.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._score(t, sampling.prompt_logprobs) for t in request.prompt[1:])]
        if running.sent >= len(reply) and not sampling.ignore_eos:
            return SequenceOutput(
                request.request_id, [], FinishReason.STOP, self.cached_tokens, prompt_logprobs=prompt_logprobs
            )
        token = reply[running.sent % len(reply)]
        running.sent += 1
        return SequenceOutput(
            request.request_id,
            [token],
            FinishReason.LENGTH if running.sent >= sampling.max_tokens else None,
            self.cached_tokens if first else 0,
            None if sampling.logprobs is None else [self._score(token, sampling.logprobs)],
            prompt_logprobs,
        )

    def _score(self, token: int, top: int) -> TokenLogprobs:
        likeliest = [(token, -0.5), *(((token + i) % self.facts.vocab_size, -0.5 - i) for i in range(1, top))]
        return TokenLogprobs(-0.5, likeliest[:top])

    @staticmethod
    def _status(connection: Connection) -> EngineStatus:
        return EngineStatus(len(connection.running), 0, 1000, 1000, [])
