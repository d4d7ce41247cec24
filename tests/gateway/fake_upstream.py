"""An OpenAI-compatible server of any manners, on a real port."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Reply = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
WORDS = ["the ", "quick ", "brown ", "fox"]
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


class FakeUpstream:
    """Answers with `replies`, in their order, then with `good`."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.bodies: list[bytes] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        """Path and headers of every request."""
        self.sent: bytes = b""
        """The bytes of the last stream."""
        self.left = 0
        """Requests whose connection was closed before their answer was whole."""
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        self.heads.append((request.path, {name.lower(): value for name, value in request.headers.items()}))
        reply = self.replies.pop(0) if self.replies else self.good
        try:
            return await reply(request, json.loads(body))
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise

    async def good(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream"):
            return await self.stream(chat_events(body))(request, body)
        return web.json_response(chat(body["model"]))

    def stream(
        self,
        pieces: list[bytes],
        *,
        then: str = "end",
        content_type: str = "text/event-stream",
        gap_s: float = 0,
    ) -> Reply:
        """Sends the pieces, then ends well, resets the connection (`die`) or says nothing more (`stall`)."""

        async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": content_type})
            await response.prepare(request)
            self.sent = b""
            for piece in pieces:
                await response.write(piece)
                self.sent += piece
                await asyncio.sleep(gap_s)
            if then == "die":
                await asyncio.sleep(0.05)  # what was written shall arrive
                abort(request)
            elif then == "stall":
                await asyncio.sleep(60)
            return response

        return reply


def abort(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


async def reset(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The connection is gone without a byte."""
    abort(request)
    return web.Response()


async def silence(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def half_a_body(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "1000"})
    await response.prepare(request)
    await response.write(b'{"id": "x", "cho')
    await asyncio.sleep(0.02)
    abort(request)
    return response


def refuse(status: int, body: Any = None, **headers: str) -> Reply:
    """An error response; `body` in OpenAI's envelope unless given."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    error = {"message": f"status {status}", "type": "said_type", "param": "said_param", "code": "said_code"}

    async def reply(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": error} if body is None else body, status=status, headers=names)

    return reply


def answer(text: str, content_type: str = "application/json", status: int = 200) -> Reply:
    async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text=text, content_type=content_type, status=status)

    return reply


def chat(model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(WORDS), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {
        "id": "up-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": USAGE,
        "system_fingerprint": "fp_é",
    }


def chat_events(body: dict[str, Any]) -> list[bytes]:
    """The events of a chat, written in an unusual but legal way, so that a change of bytes shows."""
    events = [b": a comment\n\n"]
    head = {"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    for index, word in enumerate([*WORDS, None]):
        delta = {"content": word} if word else {}
        choice = {"index": 0, "delta": delta, "finish_reason": None if word else "stop"}
        data = json.dumps({**head, "choices": [choice], "x": 1.50}, indent=None, ensure_ascii=index % 2 == 0)
        events.append(f"data:  {data}\r\n\r\n".encode())
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(f"data: {json.dumps({**head, 'choices': [], 'usage': USAGE})}\n\n".encode())
    return [*events, b"data: [DONE]\n\n"]
