"""Server-sent events: a stream of them as an ASGI response, and their syntax. Knows neither OpenAI nor engines."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from litestar.types import Receive, Scope, Send

from gateway.disconnect import ClientGoneError, while_connected

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
LINE_END = rb"(?>\r\n|\n|\r)"
BLANK_LINE = re.compile(LINE_END + LINE_END)


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


class EventSplitter:
    """Chunks of bytes -> whole events, each with the blank line that ends it; no byte is changed."""

    def __init__(self) -> None:
        self.rest = b""
        """What has come of the next event."""
        self._searched = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        data = self.rest + chunk
        events: list[bytes] = []
        start = 0
        at = self._searched
        while found := BLANK_LINE.search(data, at):
            events.append(data[start : found.end()])
            start = at = found.end()
        self.rest = data[start:]
        self._searched = max(0, len(self.rest) - 3)  # a blank line is four bytes at most
        return events


def data_of(event: bytes) -> bytes:
    """The `data` of one event; empty for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def with_data(event: bytes, data: bytes) -> bytes:
    """The event with other data, in one line; its other lines and its line ends stay."""
    lines: list[bytes] = []
    placed = False
    for line in event.splitlines(keepends=True):
        if not line.startswith(b"data:"):
            lines.append(line)
        elif not placed:
            placed = True
            lines.append(b"data: " + data + line[len(line.rstrip(b"\r\n")) :])
    return b"".join(lines)
