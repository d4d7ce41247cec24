"""The gateway's end of the wire: one WebSocket to one engine, kept open. Knows token ids, no text and no HTTP request.

    WAITING --facts and files fetched, first EngineStatus--> CONNECTED --socket closed, bad frame, silence--> WAITING

Every `Generation` belongs to one connection: when that is lost, all of them fail at once.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import structlog

from engine.protocol import (
    ADAPTER_FILES_PATH,
    ADAPTERS_PATH,
    FACTS_PATH,
    FILES_PATH,
    MAX_FRAME_BYTES,
    WIRE_PATH,
    Abort,
    AdapterFiles,
    AdapterReport,
    EngineStatus,
    Generate,
    ModelFacts,
    Rejected,
    SequenceOutput,
    StepOutput,
    ToEngine,
    decode_from_engine,
    encode,
)
from gateway.errors import GatewayError, RequestTimeoutError, UnavailableError, error_of_rejection

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
SILENCE_S = 15.0
"""The engine reports every second; after this long without a frame the connection counts as lost."""
CONNECT_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 60.0
REPORT_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class EngineFilesError(Exception):
    """The engine's facts or tokenizer files cannot be used."""


class Generation:
    """Sequences being generated for one HTTP request. Whoever holds it must `close()` it: that is the abort."""

    def __init__(self, client: "EngineClient", requests: list[Generate], timeout_s: float) -> None:
        self._client = client
        self._open = {request.request_id: index for index, request in enumerate(requests)}
        self._ids = list(self._open)
        self._outputs: list[tuple[int, SequenceOutput]] = []
        self._error: GatewayError | None = None
        self._wake = asyncio.Event()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, timeout_s)

    async def next(self) -> list[tuple[int, SequenceOutput]]:
        """All that came since the last call, as (index of the request, output), waiting if it is nothing.

        Empty once every sequence has ended.

        Raises:
            GatewayError: the engine refused a sequence or was lost, or time is up. What came before that is
                returned first.
        """
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._wake.clear()
            await self._wake.wait()
        outputs, self._outputs = self._outputs, []
        return outputs

    def finish(self, index: int) -> None:
        """Abort one sequence that needs no more tokens; nothing more comes of it."""
        request_id = self._ids[index]
        if self._open.pop(request_id, None) is not None:
            self._client.abort(request_id)

    def close(self) -> None:
        """Abort whatever has not ended. Harmless when repeated."""
        self._timer.cancel()
        for request_id in list(self._open):
            self._client.abort(request_id)
        self._open.clear()

    def deliver(self, output: SequenceOutput) -> None:
        index = self._open.get(output.request_id)
        if index is None:
            return
        if output.finish_reason is not None:
            del self._open[output.request_id]
        self._outputs.append((index, output))
        self._wake.set()

    def fail(self, error: GatewayError) -> None:
        """End the whole request; its other sequences are aborted."""
        self._error = self._error or error
        self.close()
        self._wake.set()

    def _expire(self, timeout_s: float) -> None:
        self.fail(RequestTimeoutError(f"The request was not finished within {timeout_s:g} seconds."))


class EngineClient:
    """Keeps one engine connected and sorts its frames to the generations.

    Args:
        url: The engine's address, e.g. `http://127.0.0.1:8100`.
        on_files: Called in a thread with the engine's facts and tokenizer files before requests are let through,
            again whenever the digest changes. Raises `EngineFilesError` for files it cannot use.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        on_files: Callable[[ModelFacts, dict[str, bytes]], None],
        request_timeout_s: float = 600.0,
    ) -> None:
        self.status: EngineStatus | None = None
        """The last report; None while not connected."""
        self._url = url
        self._session = session
        self._on_files = on_files
        self._request_timeout_s = request_timeout_s
        self._digest: str | None = None
        self._generations: dict[str, Generation] = {}
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._last_complaint: str | None = None
        self._jitter = random.Random()

    @property
    def connected(self) -> bool:
        return self.status is not None

    def generate(self, requests: list[Generate], priority: int = 0) -> Generation:
        """Start all of `requests`. Their ids must be unique on this gateway.

        Args:
            priority: Added to their own; the lower goes first.

        Raises:
            UnavailableError: no engine is connected.
        """
        if not self.connected:
            raise UnavailableError(
                "The engine of this model is not available at the moment.", retry_after_s=RETRY_AFTER_S
            )
        if priority:
            requests = [
                msgspec.structs.replace(request, priority=request.priority + priority) for request in requests
            ]
        generation = Generation(self, requests, self._request_timeout_s)
        for request in requests:
            self._generations[request.request_id] = generation
            self._send(request)
        return generation

    def abort(self, request_id: str) -> None:
        if self._generations.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    async def adapters(self) -> AdapterReport:
        """What the engine knows of its adapters. Raises `UnavailableError` when it does not say."""
        try:
            return msgspec.json.decode(await self._get(ADAPTERS_PATH, REPORT_TIMEOUT_S), type=AdapterReport)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise UnavailableError(
                "The engine of this model is not available at the moment.", retry_after_s=RETRY_AFTER_S
            ) from error

    async def adapter_files(self, uri: str, version: str | None) -> AdapterFiles | None:
        """The text files an adapter brought, or None: still of this version, unknown, or not to be had now.

        Whatever is wrong with the adapter is told to the request that uses it.
        """
        query = {"uri": uri} | ({"version": version} if version else {})
        timeout = aiohttp.ClientTimeout(total=self._request_timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.get(
                self._url + ADAPTER_FILES_PATH, params=query, timeout=timeout
            ) as response:
                if response.status != 200:
                    return None
                return msgspec.msgpack.decode(await response.read(), type=AdapterFiles)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
            return None

    async def run(self) -> None:
        """Connect, serve, reconnect, until cancelled. One task owns this."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                try:
                    await self._fetch_files()
                    timeout = aiohttp.ClientWSTimeout(ws_receive=SILENCE_S, ws_close=1.0)  # pyright: ignore[reportCallIssue]
                    async with self._session.ws_connect(
                        self._url + WIRE_PATH, max_msg_size=MAX_FRAME_BYTES, timeout=timeout, autoping=True
                    ) as socket:
                        await self._serve(socket)
                    reason = "The engine closed the connection."
                except (aiohttp.ClientError, OSError, TimeoutError, EngineFilesError) as error:
                    reason = f"{type(error).__name__}: {error}"
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    reason = f"Malformed message of the engine: {error}"
                if self.connected:
                    backoff_s = FIRST_BACKOFF_S
                self._lose(reason)
                await asyncio.sleep(backoff_s * self._jitter.uniform(0.75, 1.25))
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
        finally:
            self._lose("The gateway is shutting down.")

    async def _fetch_files(self) -> None:
        facts = msgspec.json.decode(await self._get(FACTS_PATH), type=ModelFacts)
        if facts.digest == self._digest:
            return
        files = {name: await self._get(f"{FILES_PATH}/{quote(name, safe='')}") for name in facts.files}
        await asyncio.to_thread(self._on_files, facts, files)
        self._digest = facts.digest

    async def _get(self, path: str, timeout_s: float = FETCH_TIMEOUT_S) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        async with self._session.get(self._url + path, timeout=timeout) as response:
            response.raise_for_status()
            return await response.read()

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._outbox = asyncio.Queue()
        sender = asyncio.create_task(self._drain_outbox(socket, self._outbox))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    raise EngineFilesError(f"Unexpected {message.type.name} frame from the engine.")
                self._receive(decode_from_engine(message.data))
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    @staticmethod
    async def _drain_outbox(socket: aiohttp.ClientWebSocketResponse, outbox: asyncio.Queue[bytes]) -> None:
        while True:
            await socket.send_bytes(await outbox.get())

    def _send(self, message: ToEngine) -> None:
        """Never blocks, so that an abort gets out even while its request is being cancelled."""
        self._outbox.put_nowait(encode(message))

    def _receive(self, message: Any) -> None:
        match message:
            case StepOutput(outputs=outputs):
                for output in outputs:
                    if output.finish_reason is None:
                        generation = self._generations.get(output.request_id)
                    else:
                        generation = self._generations.pop(output.request_id, None)
                    if generation is not None:
                        generation.deliver(output)
            case Rejected(request_id=request_id):
                if (generation := self._generations.pop(request_id, None)) is not None:
                    generation.fail(error_of_rejection(message))
            case EngineStatus():
                if self.status is None:
                    self._last_complaint = None
                    log.info("engine_connected", engine=self._url)
                self.status = message

    def _lose(self, reason: str) -> None:
        """Forget the connection and fail everything that was open on it."""
        self.status = None
        generations = set(self._generations.values())
        self._generations.clear()
        for generation in generations:
            generation.fail(
                UnavailableError(
                    "The engine was lost while working on this request.", retry_after_s=RETRY_AFTER_S
                )
            )
        if reason != self._last_complaint:
            log.warning(
                "engine_unavailable", engine=self._url, reason=reason, failed_requests=len(generations)
            )
        self._last_complaint = reason
