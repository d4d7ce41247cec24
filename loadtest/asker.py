"""Asks one model at one address, streaming, within its rate limits. Knows no task, no price, no other side."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec

from loadtest.plan import is_loopback
from loadtest.stream import CompletionStream, error_message

ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LONGEST_WAIT_S = 900.0
"""A server that wants a longer pause than this is not waited for."""
_REPEATED = {408, 409, 429, 500, 502, 503, 504, 529}
_HOPELESS = {401, 402, 403, 404, 405}
"""What the next request would get too."""


class HopelessError(Exception):
    """Asking on would be of no use; the message is fit for the user."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one question. Times in seconds; see `answer_journal.Answer`."""

    text: str
    error: str | None
    status: int | None
    maybe_charged: bool
    """The server took the request: whatever came of it may be on the bill."""
    finish_reason: str | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    streaming_s: float | None = None
    connect_s: float = 0.0
    attempts: int = 1
    waited_s: float = 0.0
    asked_unix: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    events: int = 0


class Asker:
    """One address; all its requests share connections, a number at once, and a pause that the server asked for."""

    def __init__(
        self, url: str, api_key: str | None, session: aiohttp.ClientSession, concurrency: int
    ) -> None:
        self.url = url
        self.concurrency = concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = session
        self._gate = asyncio.Semaphore(concurrency)
        self._not_before = 0.0
        self._last_refusal = ""
        self._jitter = random.Random(0)

    async def ask(self, body: Mapping[str, Any]) -> Heard:
        """Streams the answer to its end; a refusal that passes is met with a pause and another attempt.

        Raises HopelessError when the address, the key or the model is wrong, the account is empty, or the server
        cannot be reached or keeps refusing. Everything else that goes wrong is in the answer's `error`.
        """
        async with self._gate:
            waited = 0.0
            for attempt in range(1, ATTEMPTS + 1):
                waited += await self._wait_for_permission()
                heard, pause = await self._ask_once(body, attempt)
                if heard is not None:
                    return msgspec.structs.replace(heard, attempts=attempt, waited_s=waited)
                self._not_before = max(self._not_before, time.monotonic() + pause)
            raise HopelessError(f"{self.url} refused {ATTEMPTS} times in a row: {self._last_refusal}")

    async def _wait_for_permission(self) -> float:
        begun = time.monotonic()
        # A loop, because another answer may have put the pause off meanwhile.
        while (left := self._not_before - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        return time.monotonic() - begun

    async def _ask_once(self, body: Mapping[str, Any], attempt: int) -> tuple[Heard | None, float]:
        """(what was heard, 0), or (None, seconds to pause) to be asked again."""
        trace = SimpleNamespace(sent=None, connect_s=0.0)
        started, asked_unix = time.perf_counter(), time.time()
        heard = CompletionStream(keep_text=True)
        status: int | None = None
        error: str | None = None
        try:
            async with self._session.post(
                f"{self.url}/v1/chat/completions", json=body, headers=self._headers, trace_request_ctx=trace
            ) as response:
                status = response.status
                self._mind_rate_limit(response.headers)
                if status != 200:
                    return self._refused(
                        status, await response.content.read(65536), response.headers, attempt
                    )
                async for piece in response.content.iter_any():
                    heard.feed(piece, time.perf_counter())
                heard.close(time.perf_counter())
                error = heard.error
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as broken:
            self._last_refusal = f"it cannot be reached: {broken}"
            return None, self._backoff(attempt)
        except (aiohttp.ClientError, TimeoutError, OSError) as broken:
            error = f"the stream broke: {type(broken).__name__}: {broken}".rstrip(": ")
        times = heard.event_times
        sent = trace.sent or started
        return (
            Heard(
                text="".join(heard.texts or ()),
                error=error,
                status=status,
                maybe_charged=True,
                finish_reason=heard.finish_reason,
                ttft_s=times[0] - sent if times else None,
                total_s=heard.done_at - sent if heard.done_at is not None else None,
                streaming_s=times[-1] - times[0] if times else None,
                connect_s=trace.connect_s,
                asked_unix=asked_unix,
                prompt_tokens=heard.prompt_tokens,
                cached_tokens=heard.cached_tokens,
                output_tokens=heard.completion_tokens,
                events=len(times),
            ),
            0.0,
        )

    def _refused(
        self, status: int, content: bytes, headers: Mapping[str, str], attempt: int
    ) -> tuple[Heard | None, float]:
        try:
            said = error_message(msgspec.json.decode(content))
        except msgspec.DecodeError:
            said = error_message(content.decode(errors="replace"))
        self._last_refusal = f"HTTP {status}: {said}"
        if status in _HOPELESS or "insufficient_quota" in said:
            raise HopelessError(f"{self.url} answered {self._last_refusal}")
        if status not in _REPEATED:
            return Heard(text="", error=self._last_refusal, status=status, maybe_charged=False), 0.0
        pause = retry_after_s(headers, time.time())
        if pause is not None and pause > LONGEST_WAIT_S:
            raise HopelessError(
                f"{self.url} asks to wait {pause:,.0f} s ({self._last_refusal}). Run the same command again then."
            )
        return None, self._backoff(attempt) if pause is None else pause

    def _backoff(self, attempt: int) -> float:
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * self._jitter.uniform(0.75, 1.25)

    def _mind_rate_limit(self, headers: Mapping[str, str]) -> None:
        """An allowance that is used up is not tried again before it is renewed."""
        for kind in ("requests", "tokens"):
            reset = headers.get(f"x-ratelimit-reset-{kind}")
            if headers.get(f"x-ratelimit-remaining-{kind}") == "0" and reset:
                pause = min(duration_s(reset) or 0.0, LONGEST_WAIT_S)
                self._not_before = max(self._not_before, time.monotonic() + pause)


@asynccontextmanager
async def open_asker(
    url: str, api_key: str | None, *, concurrency: int, timeout_s: float
) -> AsyncIterator[Asker]:
    """An asker with its own connections. `timeout_s`: longest silence before a stream counts as broken."""
    trace = aiohttp.TraceConfig()

    async def create_started(_session: object, context: SimpleNamespace, _facts: object) -> None:
        context.create_started = time.perf_counter()

    async def created(_session: object, context: SimpleNamespace, _facts: object) -> None:
        context.trace_request_ctx.connect_s = time.perf_counter() - context.create_started

    async def headers_sent(_session: object, context: SimpleNamespace, _facts: object) -> None:
        context.trace_request_ctx.sent = time.perf_counter()

    trace.on_connection_create_start.append(create_started)
    trace.on_connection_create_end.append(created)
    trace.on_request_headers_sent.append(headers_sent)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=timeout_s),
        trust_env=not is_loopback(url),
        trace_configs=[trace],
        headers={"Accept-Encoding": "identity"},
    ) as session:
        yield Asker(url, api_key, session, concurrency)


def retry_after_s(headers: Mapping[str, str], now_unix: float) -> float | None:
    """The pause that the server asks for, in seconds; None when it names none that can be read."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        wanted = headers.get("Retry-After") or headers.get("retry-after")
        if not wanted:
            return None
        if wanted[:1].isdecimal():
            return float(wanted)
        return max(0.0, parsedate_to_datetime(wanted).timestamp() - now_unix)
    except ValueError:
        return None


def duration_s(text: str) -> float | None:
    """`1s`, `6m0s`, `20ms`, `1h2m3.5s`, or plain seconds; None for anything else."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|h|m|s))+|\d+(\.\d+)?", text):
        return None
    return sum(
        float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s|)", text)
    )
