"""Pieces of text -> the Response object and its stream of events. Knows no engine, no sockets and no store."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from engine.protocol import FinishReason
from gateway.completion import Job, Piece, ScoredToken
from gateway.errors import GatewayError
from gateway.openai_response import Answer, logprobs_of, new_call_id
from gateway.openai_schema import TokenLogprob, Usage
from gateway.responses_request import new_id, wants_logprobs
from gateway.responses_schema import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    Response,
    ResponseFailure,
    ResponseFields,
    ResponseUsage,
)
from gateway.tool_calls import ArgumentsPiece, CallStart, Content, Event
from gateway.tools import ToolUse

_encode = msgspec.json.Encoder().encode


class ResponsesWriter:
    """One response; what it says is made of events even when nobody listens to them."""

    def __init__(
        self,
        job: Job,
        fields: ResponseFields,
        tool_use: ToolUse | None,
        keep: Callable[[Response], Awaitable[None]],
    ) -> None:
        self._tool_use = tool_use
        self._reader = tool_use.reader() if tool_use else None
        self._keep = keep
        self._logprobs = wants_logprobs(fields)
        self._events: list[bytes] = []
        self._item: OutputMessage | OutputCall | None = None
        """Under way; the last of the output."""
        self._arguments: list[str] = []
        self._text: list[str] = []
        self._tokens: list[ScoredToken] = []
        """Not shown yet."""
        self._sequence = 0
        self._cut_off = False
        self.response = Response(
            id=job.id,
            created_at=job.created,
            instructions=fields.instructions,
            max_output_tokens=fields.max_output_tokens,
            metadata=fields.metadata or {},
            model=fields.model,
            output=[],
            parallel_tool_calls=fields.parallel_tool_calls is not False,
            previous_response_id=fields.previous_response_id,
            store=fields.store is not False,
            temperature=1.0 if fields.temperature is None else fields.temperature,
            text={"format": {"type": "text"}} | (fields.text or {}),
            tool_choice=fields.tool_choice or "auto",
            tools=fields.tools or [],
            top_logprobs=fields.top_logprobs or 0,
            top_p=1.0 if fields.top_p is None else fields.top_p,
        )

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        answer = answers[0]
        self.events(Piece(0, answer.text, answer.tokens, FinishReason(answer.finish_reason)))
        self._finish(usage)
        return _encode(self.response)

    def opening(self) -> bytes:
        self._say("response.created", response=self.response)
        self._say("response.in_progress", response=self.response)
        return self._take()

    def events(self, piece: Piece) -> bytes:
        self._tokens += piece.tokens
        reason = piece.finish_reason
        self._cut_off = reason is FinishReason.LENGTH
        if self._reader is None:
            found: list[Event] = [Content(piece.text)] if piece.text or piece.tokens else []
        else:
            found = self._reader.feed(piece.text)
            if reason is not None:
                found += self._reader.finish(cut_off=self._cut_off)
        for event in found:
            self._add(event)
        if reason is not None:
            if not self.response.output:
                self._open_message()
            self._close_item(last=True)
        return self._take()

    def closing(self, usage: Usage) -> bytes:
        self._finish(usage)
        self._say(f"response.{self.response.status}", response=self.response)
        return self._take()

    def failure(self, error: GatewayError) -> bytes:
        self.response.status = "failed"
        self.response.error = ResponseFailure(
            "server_error" if error.status >= 500 else error.code or error.type, error.message
        )
        self._say("error", code=error.code, message=error.message, param=error.param)
        self._say("response.failed", response=self.response)
        return self._take()

    async def keep(self, usage: Usage) -> None:
        self._finish(usage)
        if self.response.store:
            await self._keep(self.response)

    def _finish(self, usage: Usage) -> None:
        response = self.response
        if response.status != "in_progress":
            return
        response.status = "incomplete" if self._cut_off else "completed"
        if self._cut_off:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            response.completed_at = int(time.time())
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(),
            usage.total_tokens,
        )

    def _add(self, event: Event) -> None:
        match event:
            case Content(text):
                if not isinstance(self._item, OutputMessage):
                    self._close_item()
                    self._open_message()
                self._text.append(text)
                self._say_part("response.output_text.delta", delta=text, logprobs=self._score())
            case CallStart(_, name):
                self._close_item()
                self._open_call(name)
            case ArgumentsPiece(_, text):
                self._arguments.append(text)
                self._say_item("response.function_call_arguments.delta", delta=text)

    def _score(self) -> list[TokenLogprob]:
        tokens, self._tokens = self._tokens, []
        if not self._logprobs:
            return []
        scores = logprobs_of(tokens)
        message = self.response.output[-1]
        assert isinstance(message, OutputMessage)
        message.content[0].logprobs += scores
        return scores

    def _open_message(self) -> None:
        self._item = OutputMessage(id=new_id("msg"), content=[])
        self.response.output.append(self._item)
        self._say("response.output_item.added", output_index=self._index, item=self._item)
        self._item.content.append(OutputText())
        self._say_part("response.content_part.added", part=self._item.content[0])

    def _open_call(self, name: str) -> None:
        assert self._tool_use is not None
        self._item = OutputCall(id=new_id("fc"), call_id=new_call_id(self._tool_use), name=name)
        self.response.output.append(self._item)
        self._say("response.output_item.added", output_index=self._index, item=self._item)

    def _close_item(self, last: bool = False) -> None:
        item = self._item
        if item is None:
            return
        cut_off = last and self._cut_off
        if isinstance(item, OutputMessage):
            item.status = "incomplete" if cut_off else "completed"
            part = item.content[0]
            part.text, self._text = "".join(self._text), []
            self._say_part("response.output_text.done", text=part.text, logprobs=part.logprobs)
            self._say_part("response.content_part.done", part=part)
        else:
            complete = self._reader is not None and self._reader.complete == self._reader.calls
            item.status = "incomplete" if cut_off and not complete else "completed"
            item.arguments, self._arguments = "".join(self._arguments), []
            self._say_item("response.function_call_arguments.done", arguments=item.arguments, name=item.name)
        self._say("response.output_item.done", output_index=self._index, item=item)
        self._item = None

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _say_part(self, kind: str, **fields: Any) -> None:
        self._say_item(kind, content_index=0, **fields)

    def _say_item(self, kind: str, **fields: Any) -> None:
        assert self._item is not None
        self._say(kind, item_id=self._item.id, output_index=self._index, **fields)

    def _say(self, kind: str, **fields: Any) -> None:
        """Some fifteen kinds of events that differ in two or three fields each."""
        data = _encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")

    def _take(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)
