"""A server whose times are the truth: streams words by schedule and records when each was written. Knows no client.

A process of its own: prints its port, then serves `/v1/chat/completions` and `/v1/models`. `GET /truth` gives, and
forgets, a `Truth` of every answer that was streamed to its end, in seconds of `time.perf_counter`.
"""

import argparse
import asyncio
import time

import msgspec

MODEL = "calibration"
ROLE = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
WORD = b'{"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}'
LAST = b'{"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":"length"}]}'


class Truth(msgspec.Struct, frozen=True):
    """One answer: the prompt's text, when its request had come, when each word was written; seconds."""

    prompt: str
    received: float
    written: list[float]


class _Answers:
    """What all connections share: the times to keep and the times kept."""

    def __init__(self, ttft_s: float, gap_s: float, tokens: int) -> None:
        self.ttft_s = ttft_s
        self.gap_s = gap_s
        self.tokens = tokens
        self.truths: list[Truth] = []


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, written by hand so that a word costs a timer and a write."""

    def __init__(self, answers: _Answers) -> None:
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._heard = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._heard += data
        head, separator, rest = bytes(self._heard).partition(b"\r\n\r\n")
        if not separator:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        self._heard = bytearray(rest[length:])
        method, path, _ = head.split(b"\r\n")[0].split(b" ")
        if method == b"POST":
            self._stream(now, msgspec.json.decode(rest[:length]))
        elif path == b"/truth":
            self._reply(msgspec.json.encode(self._answers.truths))
            self._answers.truths = []
        elif path == b"/v1/models":
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "loraland"}
            self._reply(msgspec.json.encode({"object": "list", "data": [model]}))
        else:
            self._reply(b"{}")

    def _reply(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _stream(self, received: float, body: dict) -> None:
        answers = self._answers
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or answers.tokens)
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            + _chunk(ROLE)
        )
        # The schedule is in the loop's clock; only what is recorded must be comparable with the client's.
        first = self._loop.time() + answers.ttft_s - (time.perf_counter() - received)
        written: list[float] = []

        def write() -> None:
            written.append(time.perf_counter())
            number = len(written)
            if number < tokens:
                self._transport.write(_chunk(WORD))
                self._timer = self._loop.call_at(first + number * answers.gap_s, write)
                return
            usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": tokens}
            usage["total_tokens"] = sum(usage.values())
            end = (
                _chunk(msgspec.json.encode({"choices": [], "usage": usage}))
                + _chunk(b"[DONE]")
                + b"0\r\n\r\n"
            )
            self._transport.write(_chunk(LAST) + end)
            answers.truths.append(Truth(prompt, received, written))

        self._timer = self._loop.call_at(first, write)


def _chunk(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


async def serve(ttft_s: float, gap_s: float, tokens: int) -> None:
    answers = _Answers(ttft_s, gap_s, tokens)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(answers), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ttft-ms", type=float, default=100)
    parser.add_argument("--gap-ms", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=50)
    options = parser.parse_args()
    asyncio.run(serve(options.ttft_ms / 1000, options.gap_ms / 1000, options.tokens))
