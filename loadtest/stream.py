"""Reads a streamed completion as its bytes arrive and says when what came. Knows no clock, no socket."""

import orjson


class SseDecoder:
    """Server-sent events from bytes in pieces of any size: the `data` of every event, as it completes.

    Lines may end in LF, CR or CRLF; comments and other fields are skipped; `data` lines of an event are joined by LF.
    """

    __slots__ = ("_after_cr", "_data", "_line", "_seen_bytes")

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._seen_bytes = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that `piece` completes. A CR ends its line at once; an LF right after it is swallowed."""
        if not piece:
            return []
        if not self._seen_bytes:
            self._seen_bytes = True
            piece = piece.removeprefix(b"\xef\xbb\xbf")
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
            self._after_cr = False
        if piece:
            self._after_cr = piece.endswith(b"\r")
        events: list[bytes] = []
        *lines, self._line = (self._line + piece).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if line:
                if line.startswith(b"data:"):
                    self._data.append(line[5:].removeprefix(b" "))
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class CompletionStream:
    """What one stream of `chat/completions` or `completions` said, and when. Times are the caller's, in seconds.

    An event counts as content when it carries text, reasoning text or a tool call that is not empty: the opening
    chunk with only a role does not, nor does the closing one with only usage. Content events are not tokens: a
    server may put several tokens into one event. `completion_tokens` is the server's own count, or None. The text is
    kept only when asked for: load needs none of it.
    """

    __slots__ = (
        "_decoder",
        "cached_tokens",
        "completion_tokens",
        "done_at",
        "error",
        "event_times",
        "finish_reason",
        "prompt_tokens",
        "texts",
    )

    def __init__(self, *, keep_text: bool = False) -> None:
        self._decoder = SseDecoder()
        self.texts: list[str] | None = [] if keep_text else None
        self.event_times: list[float] = []
        self.done_at: float | None = None
        self.error: str | None = None
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None

    @property
    def ended_well(self) -> bool:
        """The server finished its answer: a finish reason, no error, and nothing cut off."""
        return self.error is None and self.finish_reason is not None

    def feed(self, piece: bytes, now: float) -> None:
        """Takes the bytes that arrived at `now`."""
        for data in self._decoder.feed(piece):
            if self.done_at is not None:
                continue
            if data.startswith(b"[DONE]"):
                self.done_at = now
                continue
            try:
                event = orjson.loads(data)
            except orjson.JSONDecodeError:
                self.error = self.error or f"not JSON in the stream: {_clip(data.decode(errors='replace'))}"
                continue
            if isinstance(event, dict):
                self._take(event, now)

    def close(self, now: float) -> None:
        """The body has ended. Without `[DONE]` and without a finish reason it was cut off."""
        if self.done_at is None:
            self.done_at = now
        if self.finish_reason is None and self.error is None:
            self.error = "the stream ended without a finish reason"

    def _take(self, event: dict, now: float) -> None:
        if event.get("error"):
            self.error = self.error or error_message(event)
            return
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.completion_tokens = _count(usage.get("completion_tokens"), self.completion_tokens)
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                self.cached_tokens = _count(details.get("cached_tokens"), self.cached_tokens)
        has_content = False
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            if isinstance(choice.get("finish_reason"), str):
                self.finish_reason = choice["finish_reason"]
            said = choice.get("delta")
            said = said if isinstance(said, dict) else choice
            has_content = has_content or any(said.get(key) for key in _CONTENT_KEYS)
            if self.texts is not None:
                self.texts.append(str(said.get("content") or said.get("text") or ""))
        if has_content:
            self.event_times.append(now)


def error_message(body: object) -> str:
    """One line for an error in OpenAI's envelope, or whatever stands in its place."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return _clip(str(error))
    label = error.get("code") or error.get("type")
    message = str(error.get("message") or error)
    return _clip(f"{label}: {message}" if label else message)


_CONTENT_KEYS = ("content", "text", "reasoning_content", "reasoning", "tool_calls")


def _count(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _clip(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
