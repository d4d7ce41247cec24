"""A request that the gateway makes of itself: the same path as one from a client, without a socket, behind all others."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from litestar.types import ASGIApp

PRIORITY = 2**32
"""Added to what a request asks for: the worst that a client can ask for itself goes before it."""


@dataclass(slots=True)
class InnerAnswer:
    status: int = 500
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


async def post_inner(app: ASGIApp, path: str, body: bytes, request_id: str) -> InnerAnswer:
    """Post JSON to the gateway's own address. Cancelling it is what a client does who leaves."""
    answer = InnerAnswer()
    parts: list[bytes] = []
    left_to_read = [body]

    async def receive() -> Any:
        if left_to_read:
            return {"type": "http.request", "body": left_to_read.pop(), "more_body": False}
        return await asyncio.Event().wait()  # this client never leaves

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.lower(): value for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
        "extensions": {},
        "state": {"priority": PRIORITY},
    }
    await app(scope, receive, send)
    answer.body = b"".join(parts)
    return answer
