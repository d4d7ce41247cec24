"""What an upstream's server-sent events say, and what is passed on of them. Knows no network.

Bytes pass unchanged, but for `model` where the client knows it by another name, and for the token counts of who did
not ask for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from gateway.errors import UpstreamError, upstream_error_of
from gateway.sse import EventSplitter, data_of, with_data

MAX_EVENT_BYTES = 16 * 2**20
LAST_TYPES = (
    b'"response.completed"',
    b'"response.failed"',
    b'"response.incomplete"',
    b'"response.cancelled"',
)
"""Of the Responses API's events, those that end a stream; the other endpoints have `[DONE]`."""

Fields = dict[str, msgspec.Raw]


class Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class UpstreamUsage(msgspec.Struct, frozen=True):
    """Token counts in the words of either API: completions' and embeddings', or the Responses API's."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens_details: Details | None = None

    @property
    def read(self) -> int:
        return self.prompt_tokens or self.input_tokens or 0

    @property
    def written(self) -> int:
        return self.completion_tokens or self.output_tokens or 0

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details or self.input_tokens_details
        return (details.cached_tokens if details else None) or 0


@dataclass(slots=True)
class Wording:
    """How an answer differs from what the upstream sent."""

    model: str | None
    """The name to write; None: it stays."""
    hides_usage: bool
    """The gateway asked for token counts, the client did not."""


class UpstreamEvents:
    """One stream, from the upstream's chunks of bytes to whole events for the client."""

    def __init__(self, wording: Wording) -> None:
        self._wording = wording
        self._splitter = EventSplitter()
        self.began = False
        """Something other than a comment has come."""
        self.ended = False
        """By `[DONE]`, by the last event of a response, or by the upstream's own error."""
        self.error: UpstreamError | None = None
        """What the upstream said had failed; the client is told in the same event."""
        self.usage: UpstreamUsage | None = None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The events that `chunk` completes.

        Raises:
            UpstreamError: an event that is not JSON, or has no end.
        """
        for event in self._splitter.feed(chunk):
            if passed := self._pass(event):
                yield passed
        if len(self._splitter.rest) > MAX_EVENT_BYTES:
            raise UpstreamError("The upstream sent an event without end.", code="upstream_invalid_response")

    def end(self) -> None:
        """Raises `UpstreamError` when the connection has ended before the stream had."""
        if not self.ended:
            raise UpstreamError(
                "The upstream ended its stream in the middle.", code="upstream_truncated", again=True
            )

    def _pass(self, event: bytes) -> bytes:
        data = data_of(event)
        if self.ended:
            return b""
        if not data:
            return event
        self.began = True
        if data.startswith(b"[DONE]"):
            self.ended = True
            return event
        fields = decode_object(data)
        kind = bytes(fields.get("type", b""))
        if kind == b'"error"' or is_given(fields, "error"):
            self.ended = True
            self.error, as_openai_has_it = upstream_error_of(data)
            return event if as_openai_has_it else with_data(event, self.error.data)
        self.ended = kind in LAST_TYPES
        usage = usage_in(fields)
        self.usage = usage or self.usage
        if usage and self._wording.hides_usage and bytes(fields.get("choices", b"")).strip() in (b"[]", b""):
            return b""
        renamed = renamed_in(fields, self._wording.model)
        return event if renamed is None else with_data(event, renamed)


def decode_object(data: bytes) -> Fields:
    """A JSON object with its values as they were written.

    Raises:
        UpstreamError: it is none.
    """
    try:
        return msgspec.json.decode(data, type=Fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamError(
            "The upstream sent something that is not a JSON object.", code="upstream_invalid_response"
        ) from error


def is_given(fields: Fields, name: str) -> bool:
    return name in fields and bytes(fields[name]) not in (b"null", b'""', b"{}", b"false")


def usage_in(fields: Fields) -> UpstreamUsage | None:
    """The token counts of an answer or event, where it has them."""
    if "usage" not in fields and "response" in fields:
        fields = decode_object(bytes(fields["response"]))
    try:
        return msgspec.json.decode(fields["usage"], type=UpstreamUsage | None) if "usage" in fields else None
    except msgspec.MsgspecError:
        return None  # counts in an unknown shape: the answer itself is still good


def renamed_in(fields: Fields, model: str | None) -> bytes | None:
    """The object with its `model`, or that of the `response` in it, called `model`; None if it has none."""
    if model is None:
        return None
    if "model" in fields:
        return msgspec.json.encode({**fields, "model": model})
    if "response" in fields:
        inner = renamed_in(decode_object(bytes(fields["response"])), model)
        return None if inner is None else msgspec.json.encode({**fields, "response": msgspec.Raw(inner)})
    return None
