"""A stream of server-sent events as an ASGI response. Knows neither OpenAI nor engines."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from litestar.types import Receive, Scope, Send

from gateway.disconnect import ClientGoneError, while_connected

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Sends events as they come; slower clients get more of them at a time.

    Args:
        events: Bytes of whole events.
        close: Called once nothing more will be sent, with whether that is because the client left.
    """

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[bool], None]) -> None:
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = False
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await while_connected(self._send(send), receive)
        except ClientGoneError:
            left = True
        finally:
            self._close(left)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
