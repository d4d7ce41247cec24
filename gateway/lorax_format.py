"""LoRAX's request as the completion that means the same, and an answer in LoRAX's shapes. Knows no addresses."""

from typing import Any

import msgspec

from gateway.completion import Job, Piece, ScoredToken
from gateway.errors import GatewayError, UnsupportedParameterError
from gateway.openai_response import Answer
from gateway.openai_schema import CompletionFields, Usage

_MUST_BE_OFF = (
    "best_of",
    "typical_p",
    "watermark",
    "adapter_parameters",
    "return_k_alternatives",
    "decoder_input_details",
    "apply_chat_template",
)


class LoraxParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`parameters` of a request; what has no meaning here is refused unless it is off."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    api_token: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool = False
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    ignore_eos_token: bool = False
    stop: list[str] = []
    truncate: int | None = None
    seed: int | None = None
    return_full_text: bool | None = None
    details: bool = False
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    typical_p: float | None = None
    watermark: bool = False
    adapter_parameters: dict[str, Any] | None = None
    return_k_alternatives: int | None = None
    decoder_input_details: bool = False
    apply_chat_template: bool = False


class LoraxFields(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `POST /generate` and `POST /generate_stream`."""

    inputs: str
    parameters: LoraxParameters | None = None
    stream: bool = False


def completion_of(fields: LoraxFields, model: str) -> CompletionFields:
    """The request in OpenAI's and vLLM's words. Raises `UnsupportedParameterError`."""
    asked = fields.parameters or LoraxParameters()
    for name in _MUST_BE_OFF:
        if getattr(asked, name) not in (None, False, 1 if name == "best_of" else None):
            raise UnsupportedParameterError(f"'{name}' is not supported.", param=name)
    schema = (asked.response_format or {}).get("schema")
    if asked.response_format is not None and schema is None:
        raise UnsupportedParameterError("'response_format' needs a 'schema'.", param="response_format")
    warped = asked.top_k is not None or asked.top_p is not None or asked.temperature not in (None, 0.0, 1.0)
    samples = asked.temperature != 0.0 and (asked.do_sample or warped)
    return CompletionFields(
        model=model,
        prompt=fields.inputs,
        adapter_id=asked.adapter_id,
        temperature=(1.0 if asked.temperature is None else asked.temperature) if samples else 0.0,
        top_k=asked.top_k if samples else None,
        top_p=asked.top_p if samples else None,
        repetition_penalty=asked.repetition_penalty,
        max_tokens=asked.max_new_tokens,
        ignore_eos=asked.ignore_eos_token,
        stop=asked.stop or None,
        truncate_prompt_tokens=asked.truncate,
        seed=asked.seed,
        guided_json=schema,
        logprobs=0,
    )


class LoraxToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float | None
    special: bool


class LoraxDetails(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[LoraxToken] | msgspec.UnsetType = msgspec.UNSET
    """Of a whole answer only."""
    tokens: list[LoraxToken] | msgspec.UnsetType = msgspec.UNSET


class LoraxAnswer(msgspec.Struct, frozen=True, kw_only=True):
    generated_text: str
    details: LoraxDetails | msgspec.UnsetType = msgspec.UNSET


class LoraxEvent(msgspec.Struct, frozen=True, kw_only=True):
    token: LoraxToken
    generated_text: str | None = None
    """Of the last event only."""
    details: LoraxDetails | None = None


class LoraxError(msgspec.Struct, frozen=True):
    error: str
    error_type: str


def error_of(error: GatewayError) -> tuple[int, LoraxError]:
    """Status and body."""
    if error.status in (400, 404, 413):
        return 422, LoraxError(error.message, "validation")
    if error.status == 429:
        return 429, LoraxError(error.message, "overloaded")
    return error.status, LoraxError(error.message, "generation")


class LoraxWriter:
    """An answer, whole and in events: one for every token."""

    def __init__(self, job: Job, fields: LoraxFields, special_ids: frozenset[int]) -> None:
        asked = fields.parameters or LoraxParameters()
        self._job = job
        self._special_ids = special_ids
        self._details = asked.details
        self._seed = asked.seed
        self._text = fields.inputs if asked.return_full_text else ""
        self._streamed = Answer()
        self._held: ScoredToken | None = None
        """The last token: its event tells how it ended."""

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        answer = answers[0]
        details: LoraxDetails | msgspec.UnsetType = msgspec.UNSET
        if self._details:
            details = msgspec.structs.replace(
                self._ended(answer, usage), prefill=[], tokens=[self._token(token) for token in answer.tokens]
            )
        return msgspec.json.encode(LoraxAnswer(generated_text=self._text + answer.text, details=details))

    def opening(self) -> bytes:
        return b""

    def events(self, piece: Piece) -> bytes:
        self._streamed.add(piece)
        events = b""
        for token in piece.tokens:
            if self._held is not None:
                events += _event(LoraxEvent(token=self._token(self._held)))
            self._held = token
        return events

    def closing(self, usage: Usage) -> bytes:
        last = self._held
        return _event(
            LoraxEvent(
                token=LoraxToken(0, "", None, True) if last is None else self._token(last),
                generated_text=self._text + self._streamed.text,
                details=self._ended(self._streamed, usage) if self._details else None,
            )
        )

    def failure(self, error: GatewayError) -> bytes:
        return _event(error_of(error)[1])

    async def keep(self, usage: Usage) -> None:
        """Nothing is stored."""

    def _token(self, token: ScoredToken) -> LoraxToken:
        return LoraxToken(token.id, token.text, token.logprob, token.id in self._special_ids)

    def _ended(self, answer: Answer, usage: Usage) -> LoraxDetails:
        reason = "length"
        if answer.finish_reason != "length":
            written = "".join(token.text for token in answer.tokens)
            reason = "stop_sequence" if any(stop in written for stop in self._job.stops) else "eos_token"
        return LoraxDetails(
            finish_reason=reason,
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.completion_tokens,
            seed=self._seed,
        )


def _event(value: msgspec.Struct) -> bytes:
    return b"data:" + msgspec.json.encode(value) + b"\n\n"
