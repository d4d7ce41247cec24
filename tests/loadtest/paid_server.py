"""A second OpenAI-compatible server: answers from a rule, with usage, rate limits and faults. Knows no model.

Runs in the test's own process, in a thread of its own.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

PROMPT_TOKENS = 100
OUTPUT_TOKENS = 10


@dataclass
class PaidServer:
    """What it should do, and what it saw. Change it between runs, not during one."""

    answers: dict[str, str] = field(default_factory=dict)
    """Last user message → answer of the model `gpt-4`; every other model says `dunno`."""
    key: str | None = None
    refuse_first: int = 0
    """So many requests get 429 with `Retry-After`."""
    retry_after: str = "0.05"
    cut_every: int = 0
    """Every so many accepted requests break off."""
    die_after: int | None = None
    """After so many accepted requests all get 500."""
    delay_s: float = 0.0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the accepted requests: what would be on the bill."""
    refused: int = 0
    at_once: int = 0
    most_at_once: int = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return self._error(401, "invalid_api_key", "that key is wrong")
        if self.refused < self.refuse_first:
            self.refused += 1
            return self._error(429, "rate_limit_exceeded", "slow down", {"Retry-After": self.retry_after})
        if self.die_after is not None and len(self.asked) >= self.die_after:
            return self._error(404, "model_not_found", "the model is gone")
        body = await request.json()
        self.asked.append(body)
        number = len(self.asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._stream(
                request, body, broken=bool(self.cut_every) and number % self.cut_every == 0
            )
        finally:
            self.at_once -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], *, broken: bool
    ) -> web.StreamResponse:
        await asyncio.sleep(self.delay_s)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(facts: dict[str, Any]) -> None:
            await response.write(b"data: " + web.json_response(facts).body + b"\n\n")  # pyright: ignore

        await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        said = self.answers.get(body["messages"][-1]["content"], "?") if body["model"] == "gpt-4" else "dunno"
        for piece in (said[:3], said[3:]):
            await send({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if broken:
            assert request.transport is not None
            request.transport.close()
            return response
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
        error = {"message": message, "type": "error", "param": None, "code": code}
        return web.json_response({"error": error}, status=status, headers=headers)


@contextmanager
def paid_server(**options: Any) -> Iterator[PaidServer]:
    server = PaidServer(**options)
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runner = loop.run_until_complete(start())

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(ready.set)
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
