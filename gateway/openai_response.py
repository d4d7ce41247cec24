"""Pieces of text -> OpenAI's response bodies and stream events, as bytes. Knows no engine and no sockets."""

import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from engine.protocol import FinishReason
from gateway.completion import Completion, Job, Piece, ScoredToken
from gateway.errors import GatewayError, envelope
from gateway.openai_schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    FunctionCall,
    FunctionCallDelta,
    Message,
    PromptTokensDetails,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from gateway.openai_schema import Completion as CompletionBody
from gateway.tool_calls import ArgumentsPiece, CallStart, Content, ToolCallReader
from gateway.tool_calls import Event as CallEvent
from gateway.tools import ToolUse

DONE = b"data: [DONE]\n\n"
CALLS = "tool_calls"
"""The finish reason of an answer that calls functions."""

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Answer:
    """A finished choice."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason.value


class Writer(Protocol):
    """How one endpoint writes what it has to say."""

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        """The whole response."""
        ...

    def opening(self) -> bytes:
        """Events before the first piece."""
        ...

    def events(self, piece: Piece) -> bytes:
        """Events of one piece; none for a piece without anything to show."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """Events after the last piece."""
        ...

    def failure(self, error: GatewayError) -> bytes:
        """The last events of a stream that failed."""
        ...

    async def keep(self, usage: Usage) -> None:
        """Store what has to be, when all pieces have come."""
        ...


class ChatWriter:
    """`chat.completion` and `chat.completion.chunk`; with `tool_use`, function calls are read out of the text."""

    def __init__(
        self, job: Job, *, logprobs: bool, include_usage: bool, tool_use: ToolUse | None = None
    ) -> None:
        self._job = job
        self._logprobs = logprobs
        self._frame = _Frame(job, "chat.completion.chunk", include_usage)
        self._tool_use = tool_use
        self._callings = [_Calling(tool_use.reader()) for _ in job.requests] if tool_use else []

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return _encode(
            ChatCompletion(
                id=self._job.id,
                created=self._job.created,
                model=self._job.model_id,
                choices=choices,
                usage=usage,
            )
        )

    def opening(self) -> bytes:
        roles = (
            ChatChunkChoice(index, Delta(role="assistant", content=""))
            for index in range(len(self._job.requests))
        )
        return b"".join(map(self._frame.event, roles))

    def events(self, piece: Piece) -> bytes:
        if self._tool_use is not None:
            return b"".join(map(self._frame.event, self._calling_choices(piece, self._tool_use)))
        events = b""
        if piece.text or piece.tokens:
            logprobs = self._chat_logprobs(piece.tokens)
            events = self._frame.event(ChatChunkChoice(piece.index, Delta(content=piece.text), logprobs))
        if piece.finish_reason is not None:
            last = ChatChunkChoice(piece.index, Delta(), finish_reason=piece.finish_reason.value)
            events += self._frame.event(last)
        return events

    def closing(self, usage: Usage) -> bytes:
        return self._frame.closing(usage)

    def failure(self, error: GatewayError) -> bytes:
        return error_event(error)

    async def keep(self, usage: Usage) -> None:
        """Nothing is stored."""

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        message, reason = Message(content=answer.text), answer.finish_reason
        if self._tool_use is not None:
            said = read_answer(self._tool_use, answer)
            if said.calls:
                message = Message(content=said.text or None, tool_calls=said.calls)
                reason = CALLS if reason == FinishReason.STOP else reason
            else:
                message = Message(content=said.text)
        return ChatChoice(index, message, self._chat_logprobs(answer.tokens), reason)

    def _calling_choices(self, piece: Piece, tool_use: ToolUse) -> Iterator[ChatChunkChoice]:
        calling = self._callings[piece.index]
        calling.tokens += piece.tokens
        events = calling.reader.feed(piece.text)
        reason = piece.finish_reason
        if reason is not None:
            events += calling.reader.finish(cut_off=reason is FinishReason.LENGTH)
            if calling.tokens and not events:
                events.append(Content(""))
        for event in events:
            scored, calling.tokens = calling.tokens, []
            yield ChatChunkChoice(piece.index, _delta(event, tool_use), self._chat_logprobs(scored))
        if reason is not None:
            calls = reason is FinishReason.STOP and calling.reader.calls
            yield ChatChunkChoice(piece.index, Delta(), finish_reason=CALLS if calls else reason.value)

    def _chat_logprobs(self, tokens: list[ScoredToken]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(logprobs_of(tokens))


@dataclass(slots=True)
class _Calling:
    """A streamed choice out of which calls are read."""

    reader: ToolCallReader
    tokens: list[ScoredToken] = field(default_factory=list)
    """Not shown yet: their text waits in the reader."""


@dataclass(frozen=True, slots=True)
class Said:
    """A finished answer, told apart."""

    text: str
    calls: list[ToolCall]


def read_answer(tool_use: ToolUse, answer: Answer) -> Said:
    """Text and calls of a whole answer. A call that `max_tokens` cut off is left out."""
    cut_off = answer.finish_reason == FinishReason.LENGTH
    reader = tool_use.reader()
    text: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in [*reader.feed(answer.text), *reader.finish(cut_off=cut_off)]:
        match event:
            case Content(said):
                text.append(said)
            case CallStart(_, name):
                names.append(name)
                arguments.append([])
            case ArgumentsPiece(index, piece):
                arguments[index].append(piece)
    calls = [
        ToolCall(id=new_call_id(tool_use), function=FunctionCall(name, "".join(pieces)))
        for name, pieces in zip(names, arguments, strict=True)
    ]
    return Said("".join(text), calls[: reader.complete] if cut_off else calls)


def new_call_id(tool_use: ToolUse) -> str:
    if tool_use.short_ids:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def _delta(event: CallEvent, tool_use: ToolUse) -> Delta:
    match event:
        case Content(text):
            return Delta(content=text)
        case CallStart(index, name):
            function = FunctionCallDelta(name=name)
            call = ToolCallDelta(index=index, id=new_call_id(tool_use), type="function", function=function)
        case ArgumentsPiece(index, text):
            call = ToolCallDelta(index=index, function=FunctionCallDelta(arguments=text))
    return Delta(tool_calls=[call])


class CompletionWriter:
    """`text_completion`, whole and in events."""

    def __init__(self, job: Job, *, logprobs: bool, include_usage: bool) -> None:
        self._job = job
        self._logprobs = logprobs
        self._frame = _Frame(job, "text_completion", include_usage)

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index, answer.text, self._completion_logprobs(answer.tokens), answer.finish_reason
            )
            for index, answer in enumerate(answers)
        ]
        return _encode(
            CompletionBody(
                id=self._job.id,
                created=self._job.created,
                model=self._job.model_id,
                choices=choices,
                usage=usage,
            )
        )

    def opening(self) -> bytes:
        return b""

    def events(self, piece: Piece) -> bytes:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return b""
        reason = piece.finish_reason.value if piece.finish_reason else None
        return self._frame.event(
            CompletionChoice(piece.index, piece.text, self._completion_logprobs(piece.tokens), reason)
        )

    def closing(self, usage: Usage) -> bytes:
        return self._frame.closing(usage)

    def failure(self, error: GatewayError) -> bytes:
        return error_event(error)

    async def keep(self, usage: Usage) -> None:
        """Nothing is stored."""

    def _completion_logprobs(self, tokens: list[ScoredToken]) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        return CompletionLogprobs(
            [token.text for token in tokens],
            [token.logprob for token in tokens],
            [_top_by_text(token) for token in tokens],
            [token.offset for token in tokens],
        )


class _Frame:
    """What all events of a stream share, written once."""

    def __init__(self, job: Job, kind: str, include_usage: bool) -> None:
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.model_id}
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._include_usage = include_usage

    def event(self, choice: ChatChunkChoice | CompletionChoice) -> bytes:
        return self._head + _encode(choice) + self._tail

    def closing(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n" + DONE


def logprobs_of(tokens: list[ScoredToken]) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token.text,
            token.logprob or 0.0,
            list(token.raw),
            [TopLogprob(text, logprob, list(raw)) for text, raw, logprob in token.top],
        )
        for token in tokens
    ]


def error_event(error: GatewayError) -> bytes:
    """The last event of a stream that failed; the SDK raises on it."""
    return b"data: " + _encode(envelope(error)) + b"\n\n"


def usage_of(completion: Completion) -> Usage:
    prompt, output = completion.prompt_tokens, completion.completion_tokens
    return Usage(prompt, output, prompt + output, PromptTokensDetails(completion.cached_tokens))


def _top_by_text(token: ScoredToken) -> dict[str, float] | None:
    """Likeliest first; the sampled token is always among them."""
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for text, _, logprob in token.top:
        top.setdefault(text, logprob)
    top.setdefault(token.text, token.logprob)
    return top
