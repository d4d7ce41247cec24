"""The engine's HTTP edge: the gateways' WebSocket, health, metrics, model facts. Knows no scheduling and no tensors."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from engine.protocol import (
    ADAPTER_FILES_PATH,
    ADAPTERS_PATH,
    FACTS_PATH,
    FILES_PATH,
    MAX_FRAME_BYTES,
    PIN_PATH,
    UNPIN_PATH,
    WIRE_PATH,
    Abort,
    AdapterFiles,
    AdapterRef,
    Generate,
    ModelFacts,
    decode_to_engine,
    encode,
)

if TYPE_CHECKING:  # it brings torch, and the edge answers before that is loaded
    from engine.loop import EngineLoop, Message

STATUS_INTERVAL_S = 1.0
STALL_S = 120.0
"""A loop that has not come round for this long is not healthy (a step takes far less)."""
MAX_BACKLOG_BYTES = 32 * 2**20
"""A gateway that leaves this much unread is cut off."""

log = structlog.get_logger()


class Connection:
    """One gateway's WebSocket. Frames are queued, so the loop never waits for a slow reader."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.Transport | None) -> None:
        self.socket = socket
        self._transport = transport
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._backlog = 0

    def send(self, frame: bytes) -> None:
        self._backlog += len(frame)
        self._frames.put_nowait(frame)

    @property
    def overrun(self) -> bool:
        return self._backlog > MAX_BACKLOG_BYTES

    def cut_off(self) -> None:
        """Drop the connection now. A closing handshake would wait for the reader that does not read."""
        if self._transport is not None:
            self._transport.abort()

    async def drain(self) -> None:
        """Write frames until cancelled; the connection's sender task."""
        with suppress(ConnectionError):
            while True:
                frame = await self._frames.get()
                await self.socket.send_bytes(frame)
                self._backlog -= len(frame)


class EngineServer:
    """Serves from the start; answers 503 until `attach` gives it a loaded model."""

    def __init__(self) -> None:
        self._engine: EngineLoop | None = None
        self._facts: ModelFacts | None = None
        self._files: dict[str, bytes] = {}
        self._side_files: Callable[[str], dict[str, bytes]] = lambda uri: {}
        self._connections: dict[int, Connection] = {}
        self._ids = itertools.count(1)
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self.app = web.Application(client_max_size=MAX_FRAME_BYTES)
        self.app.add_routes(
            [
                web.get(WIRE_PATH, self._wire),
                web.get(FACTS_PATH, self._serve_facts),
                web.get(FILES_PATH + "/{name}", self._serve_file),
                web.get(ADAPTERS_PATH, self._adapters),
                web.get(ADAPTER_FILES_PATH, self._serve_adapter_files),
                web.post(PIN_PATH, self._pin),
                web.post(UNPIN_PATH, self._pin),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self.app.on_startup.append(self._remember_loop)
        self.app.on_shutdown.append(self._close_connections)

    def attach(
        self,
        engine: "EngineLoop",
        facts: ModelFacts,
        files: dict[str, bytes],
        side_files: Callable[[str], dict[str, bytes]] = lambda uri: {},
    ) -> None:
        """The model is loaded: from now on requests are served.

        Args:
            side_files: What the adapter at a URI brought for the text side (blocks; raises `AdapterError`).
        """
        self._engine, self._facts, self._files = engine, facts, files
        self._side_files = side_files

    def deliver(self, outbox: "dict[int, list[Message]]") -> None:
        """Called on the engine's thread with the step's messages; returns at once."""
        if self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._dispatch, outbox)

    def _dispatch(self, outbox: "dict[int, list[Message]]") -> None:
        for key, messages in outbox.items():
            connection = self._connections.get(key)
            if connection is None:
                continue
            for message in messages:
                connection.send(encode(message))
            if connection.overrun:
                log.warning("connection_cut_off", connection=key, reason="it does not read")
                del self._connections[key]
                connection.cut_off()

    async def _remember_loop(self, _: web.Application) -> None:
        self._asyncio = asyncio.get_running_loop()

    async def _close_connections(self, _: web.Application) -> None:
        for connection in list(self._connections.values()):
            await connection.socket.close(code=WSCloseCode.GOING_AWAY, message=b"engine is shutting down")

    async def _wire(self, request: web.Request) -> web.StreamResponse:
        engine = self._engine
        if engine is None:
            return _loading()
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES, heartbeat=20.0, timeout=1.0)
        await socket.prepare(request)
        key, connection = next(self._ids), Connection(socket, request.transport)
        self._connections[key] = connection
        log.info("gateway_connected", connection=key, peer=request.remote)
        tasks = [
            asyncio.create_task(connection.drain()),
            asyncio.create_task(_report_status(engine, connection)),
        ]
        try:
            async for message in socket:
                if message.type is not WSMsgType.BINARY:
                    raise msgspec.DecodeError("frames must be binary")
                match decode_to_engine(message.data):
                    case Generate() as generate:
                        engine.submit(key, generate)
                    case Abort(request_id):
                        engine.abort(key, request_id)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("malformed_frame", connection=key, reason=str(error))
            reason = f"malformed frame: {error}".encode()[:120]
            await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=reason)
        finally:
            self._connections.pop(key, None)
            engine.disconnect(key)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            log.info("gateway_disconnected", connection=key)
        return socket

    async def _serve_facts(self, _: web.Request) -> web.Response:
        if self._facts is None:
            return _loading()
        body = msgspec.json.encode(self._facts)
        return web.Response(
            body=body, content_type="application/json", headers={"ETag": f'"{self._facts.digest}"'}
        )

    async def _serve_file(self, request: web.Request) -> web.Response:
        if self._facts is None:
            return _loading()
        content = self._files.get(request.match_info["name"])
        if content is None:
            return web.json_response(
                {"error": f"there is no file {request.match_info['name']!r}"}, status=404
            )
        etag = f'"{self._facts.digest}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        return web.Response(body=content, content_type="application/octet-stream", headers={"ETag": etag})

    async def _serve_adapter_files(self, request: web.Request) -> web.Response:
        if self._engine is None:
            return _loading()
        from engine.host_adapter import AdapterError, AdapterNotFoundError

        try:
            files = await asyncio.to_thread(self._side_files, request.query.get("uri", ""))
        except AdapterNotFoundError:
            return web.json_response({"error": "there is no such adapter"}, status=404)
        except AdapterError as error:
            return web.json_response({"error": str(error)}, status=422)
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
        version = digest.hexdigest()
        if request.query.get("version") == version:
            return web.Response(status=204)
        return web.Response(
            body=encode(AdapterFiles(version, files)), content_type="application/octet-stream"
        )

    async def _pin(self, request: web.Request) -> web.Response:
        if self._engine is None:
            return _loading()
        from engine.host_adapter import AdapterError, AdapterNotFoundError

        change = self._engine.pin if request.path == PIN_PATH else self._engine.unpin
        try:
            await asyncio.to_thread(change, msgspec.json.decode(await request.read(), type=AdapterRef))
        except msgspec.MsgspecError as error:
            return web.json_response(
                {"error": f'the body must be {{"name": ..., "uri": ...}}: {error}'}, status=400
            )
        except AdapterNotFoundError:
            return web.json_response({"error": "there is no such adapter"}, status=404)
        except AdapterError as error:
            return web.json_response({"error": str(error)}, status=422)
        return web.Response(status=202)

    async def _healthz(self, _: web.Request) -> web.Response:
        stalled = self._engine is not None and time.monotonic() - self._engine.alive_s > STALL_S
        return web.Response(text="stalled\n" if stalled else "ok\n", status=503 if stalled else 200)

    async def _readyz(self, _: web.Request) -> web.Response:
        return _loading() if self._engine is None else web.Response(text="ready\n")

    async def _adapters(self, _: web.Request) -> web.Response:
        if self._engine is None:
            return _loading()
        return web.Response(
            body=msgspec.json.encode(self._engine.adapters()), content_type="application/json"
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        if self._engine is None:
            return _loading()
        return web.Response(
            body=self._engine.metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )


async def _report_status(engine: "EngineLoop", connection: Connection) -> None:
    while True:
        connection.send(encode(engine.status()))
        await asyncio.sleep(STATUS_INTERVAL_S)


def _loading() -> web.Response:
    return web.json_response({"error": "the model is loading"}, status=503, headers={"Retry-After": "1"})
