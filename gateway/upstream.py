"""One other OpenAI-compatible server: sends it a request, again where that helps, not while it is down.

Knows neither public names nor who asks.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
import structlog

from gateway.breaker import Breaker
from gateway.config import UpstreamConfig
from gateway.errors import RequestTimeoutError, UpstreamError, upstream_error_of
from gateway.upstream_events import Fields, UpstreamEvents, Wording, decode_object, is_given

FIRST_WAIT_S = 0.25
"""Before the second try; doubled for each further one, and shortened at random by up to a half."""
LAST_WORDS_S = 0.2
"""How long the end of a connection is waited for after the end of a stream, so that it can be used again."""
MAX_ERROR_BYTES = 64 * 1024
EVENT_STREAM = "text/event-stream"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Letter:
    """One request to an upstream."""

    path: str
    """Below the upstream's url, e.g. `/chat/completions`."""
    body: bytes
    stream: bool
    request_id: str
    deadline: float
    """When to give up, in the event loop's time."""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    body: bytes
    fields: Fields


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    said: UpstreamEvents
    first: bytes
    """Whole events, up to the first that is more than a comment."""
    rest: AsyncGenerator[bytes]
    """Raises `UpstreamError` when the stream breaks."""
    close: Callable[[], None]
    """Ends the connection, unless the answer came whole. To be called in every case."""


class Upstream:
    """Sends requests. Its connections are the session's."""

    def __init__(self, config: UpstreamConfig, session: aiohttp.ClientSession) -> None:
        self.name = config.name
        self._config = config
        self._session = session
        self._url = config.url.rstrip("/")
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self._breaker = Breaker(config.breaker_failures, config.breaker_pause_s)
        self.failures = 0
        """Tries that failed by the upstream's fault, since the start."""

    @property
    def is_open(self) -> bool:
        """Whether its circuit is: requests are refused unsent, but for a probe."""
        return self._breaker.open_until is not None

    async def send(self, letter: Letter, wording: Wording) -> WholeAnswer | StreamedAnswer:
        """The answer, or of a stream its beginning: until then a failure is repaired by trying again.

        Raises:
            UpstreamError: nothing helped, or nothing would, or the deadline has passed.
        """
        tried = 0
        while True:
            refusal_s = self._breaker.refusal_s(time.monotonic())
            if refusal_s is not None:
                raise UpstreamError(
                    f"The upstream {self.name!r} has failed too often and is left alone for a moment.",
                    status=503,
                    code="upstream_unavailable",
                    retry_after_s=refusal_s,
                )
            try:
                return await self._try(letter, wording)
            except UpstreamError as error:
                self._judge(error, letter.request_id)
                wait_s = self._wait_s(error, tried, letter.deadline)
                if wait_s is None:
                    raise
            tried += 1
            await asyncio.sleep(wait_s)

    async def _try(self, letter: Letter, wording: Wording) -> WholeAnswer | StreamedAnswer:
        first_by = letter.deadline
        if letter.stream:
            now = asyncio.get_running_loop().time()
            first_by = min(first_by, now + self._config.first_byte_timeout_s)
        response: aiohttp.ClientResponse | None = None
        answer: WholeAnswer | StreamedAnswer | None = None
        try:
            async with asyncio.timeout_at(first_by):
                response = await self._post(letter)
                await self._check_head(response, letter.stream)
                if letter.stream:
                    answer = await self._open_stream(response, letter, wording)
                    self._breaker.answered()
                else:
                    answer = await self._read_whole(response, letter)
                    self._breaker.succeeded()
                return answer
        except aiohttp.ClientError as error:  # before TimeoutError: it has timeouts of its own, of connecting
            raise self._lost(error) from error
        except TimeoutError as error:
            if first_by == letter.deadline:
                raise self._unfinished() from error
            raise self._silent(self._config.first_byte_timeout_s) from error
        except OSError as error:
            raise self._lost(error) from error
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        finally:
            if response is not None and not isinstance(answer, StreamedAnswer):
                response.close()

    async def _post(self, letter: Letter) -> aiohttp.ClientResponse:
        headers = {
            "content-type": "application/json",
            "accept": EVENT_STREAM if letter.stream else "application/json",
            "accept-encoding": "identity",
            "x-request-id": letter.request_id,
        }
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        return await self._session.post(
            self._url + letter.path,
            data=letter.body,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._config.connect_timeout_s),
            allow_redirects=False,
        )

    async def _check_head(self, response: aiohttp.ClientResponse, stream: bool) -> None:
        status = response.status
        if status in (401, 403):
            # The caller's key is none of the upstream's business, and its words may quote ours.
            raise UpstreamError(
                f"The upstream {self.name!r} refused the gateway's own key; its operator must look into it.",
                code="upstream_refused_key",
            )
        if status >= 400:
            error, _ = upstream_error_of(await response.content.read(MAX_ERROR_BYTES), status)
            error.retry_after_s = _retry_after_s(response)
            if response.headers.get("x-should-retry") == "false":
                error.again = False
            raise error
        kind = response.content_type
        if not 200 <= status < 300 or (kind != EVENT_STREAM if stream else not kind.endswith("json")):
            wanted = "an event stream" if stream else "JSON"
            raise UpstreamError(
                f"The upstream {self.name!r} answered with status {status} and {kind[:100]!r} instead of {wanted}.",
                code="upstream_invalid_response",
            )

    async def _read_whole(self, response: aiohttp.ClientResponse, letter: Letter) -> WholeAnswer:
        chunks: list[bytes] = []
        while chunk := await self._chunk(response, letter, first=not chunks):
            chunks.append(chunk)
        body = b"".join(chunks)
        fields = decode_object(body)
        if is_given(fields, "error") and "object" not in fields:
            raise upstream_error_of(body)[0]
        return WholeAnswer(body, fields)

    async def _open_stream(
        self, response: aiohttp.ClientResponse, letter: Letter, wording: Wording
    ) -> StreamedAnswer:
        said = UpstreamEvents(wording)
        first: list[bytes] = []
        while not said.began:
            chunk = await self._chunk(response, letter, first=True)
            if not chunk:
                said.end()
            first.extend(said.feed(chunk))
            if said.error is not None:
                raise said.error
        return StreamedAnswer(said, b"".join(first), self._rest(response, letter, said), response.close)

    async def _rest(
        self, response: aiohttp.ClientResponse, letter: Letter, said: UpstreamEvents
    ) -> AsyncGenerator[bytes]:
        """The stream after its beginning, in pieces of whole events."""
        try:
            while not said.ended and (chunk := await self._chunk(response, letter)):
                whole: list[bytes] = []
                broken: UpstreamError | None = None
                try:
                    whole.extend(said.feed(chunk))
                except UpstreamError as error:
                    broken = error
                if data := b"".join(whole):
                    yield data
                if broken is not None:
                    raise broken
            said.end()
        except UpstreamError as error:
            self._judge(error, letter.request_id)
            raise
        except (aiohttp.ClientError, OSError) as error:
            lost = self._lost(error)
            self._judge(lost, letter.request_id)
            raise lost from error
        if said.error is not None:
            self._judge(said.error, letter.request_id)
            return
        self._breaker.succeeded()
        await self._last_words(response)

    async def _chunk(self, response: aiohttp.ClientResponse, letter: Letter, first: bool = False) -> bytes:
        """What has come, empty at the end. The first may take as long as the answer's beginning may."""
        left_s = letter.deadline - asyncio.get_running_loop().time()
        idle_s = left_s if first else min(left_s, self._config.idle_timeout_s)
        try:
            async with asyncio.timeout(idle_s):
                return await response.content.readany()
        except aiohttp.ClientError:
            raise
        except TimeoutError as error:
            raise (self._unfinished() if idle_s == left_s else self._silent(idle_s)) from error

    async def _last_words(self, response: aiohttp.ClientResponse) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                while await response.content.readany():
                    pass
        except (aiohttp.ClientError, OSError):
            pass  # the answer is whole; only the connection is not used again

    def _judge(self, error: UpstreamError, request_id: str) -> None:
        log.warning(
            "upstream_failed",
            upstream=self.name,
            request_id=request_id,
            status=error.status,
            error=error.code,
        )
        if error.is_fault:
            self.failures += 1
            self._breaker.failed(time.monotonic())
        else:
            self._breaker.succeeded()

    def _wait_s(self, error: UpstreamError, tried: int, deadline: float) -> float | None:
        """How long to wait before the next try; None: there is none."""
        if not error.again or tried >= self._config.retries:
            return None
        wait_s = error.retry_after_s
        if wait_s is None:
            wait_s = FIRST_WAIT_S * 2**tried * random.uniform(0.5, 1)
        left_s = deadline - asyncio.get_running_loop().time()
        return wait_s if wait_s <= min(self._config.max_retry_wait_s, left_s) else None

    def _silent(self, seconds: float) -> UpstreamError:
        return UpstreamError(
            f"The upstream {self.name!r} sent nothing for {seconds:g} s.", status=504, code="upstream_timeout"
        )

    def _unfinished(self) -> UpstreamError:
        return UpstreamError(
            f"The upstream {self.name!r} did not finish in time.", status=504, code=RequestTimeoutError.code
        )

    def _lost(self, error: Exception) -> UpstreamError:
        """Without the error's own words: they hold addresses of the operator's network."""
        log.info("upstream_lost", upstream=self.name, cause=repr(error))
        return UpstreamError(
            f"The connection to the upstream {self.name!r} failed.", code="upstream_unreachable", again=True
        )


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """What the upstream asks for, in seconds: `retry-after-ms`, or `retry-after` in either of its forms."""
    try:
        if (given := response.headers.get("retry-after-ms")) is not None:
            seconds = float(given) / 1000
        elif (given := response.headers.get("retry-after")) is None:
            return None
        elif given.strip().isdigit():
            seconds = float(given)
        else:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
