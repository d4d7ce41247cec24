"""One request from prompt to text: what to ask of the engine, and what its tokens say. Knows no HTTP and no JSON."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from engine.protocol import AdapterRef, FinishReason, Generate, SamplingParams, SequenceOutput, TokenLogprobs
from gateway.detokenizer import Detokenizer
from gateway.engine_client import Generation
from gateway.errors import ContextLengthError, GrammarInvalidError, InvalidRequestError
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; the text is kept only to be echoed."""

    token_ids: list[int]
    echo: str | None = None
    offsets: list[int] | None = None
    """Where each token begins in `echo`; only when its logprobs are wanted."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request ready for the engine: `n` choices of every prompt, in the order of `prompts`."""

    id: str
    model_id: str
    created: int
    tokenizer: Tokenizer
    prompts: list[Prompt]
    requests: list[Generate]
    n: int
    stops: list[str]
    continues: bool
    """The text goes on from the prompt (completions), it is not a new message (chat)."""
    keeps_special: bool = False
    """Special tokens are written out."""
    keeps_stop: bool = False
    """The stop string that ended the text is part of it."""
    discards_output: bool = False
    """Only the prompt is asked for (echo with max_tokens 0); the engine still makes one token."""
    shown_special: frozenset[int] = frozenset()
    """Special tokens that are part of the text: those that mark function calls."""
    grammar_param: str = "response_format"
    """The parameter to name when the engine cannot use the grammar."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its likeliest alternatives, for `logprobs`."""

    text: str
    raw: bytes
    logprob: float | None
    """None for the first token of a prompt."""
    top: list[tuple[str, bytes, float]]
    offset: int
    """Where it begins in the choice's text, in characters."""
    id: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one frame of the engine added to one choice."""

    index: int
    text: str
    tokens: list[ScoredToken]
    finish_reason: FinishReason | None = None


def requests_of(
    job_id: str,
    prompts: list[Prompt],
    n: int,
    max_tokens: list[int],
    sampling: SamplingParams,
    seed: int | None,
    adapter: AdapterRef | None,
    *,
    priority: int = 0,
    cache_salt: str = "",
    deadline_s: float | None = None,
) -> list[Generate]:
    """One `Generate` per choice; with a seed, the choices of a prompt get seeds in a row.

    The choices of a prompt follow the first, so that the prompt is computed once.
    """
    requests: list[Generate] = []
    for prompt, limit in zip(prompts, max_tokens, strict=True):
        first = f"{job_id}-{len(requests)}"
        for choice in range(n):
            own = msgspec.structs.replace(
                sampling,
                max_tokens=limit,
                min_tokens=min(sampling.min_tokens, limit),
                seed=None if seed is None else (seed + choice) % 2**63,
            )
            requests.append(
                Generate(
                    f"{job_id}-{len(requests)}",
                    prompt.token_ids,
                    own,
                    adapter,
                    follows=first if choice else None,
                    priority=priority,
                    deadline_s=deadline_s,
                    cache_salt=cache_salt,
                )
            )
    return requests


def tokens_left(
    prompt_tokens: int, wanted: int | None, default: int | None, context: int, source: str
) -> int:
    """How many tokens a prompt may get: what was asked for, or `default`, or all that fit (None).

    Args:
        source: The parameter that the prompt came from, "messages" or "prompt".

    Raises:
        ContextLengthError: prompt and tokens asked for do not fit together.
    """
    room = context - prompt_tokens
    if room < (1 if wanted is None else 0):
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, your {source} resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the {source}.",
            param=source,
        )
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        asked = f"{prompt_tokens + wanted} tokens" if wanted < 2**31 else "far too many tokens"
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, you requested {asked} "
            f"({prompt_tokens} in the {source}, {wanted if wanted < 2**31 else 'the rest'} in the completion). "
            f"Please reduce the length of the {source} or completion.",
            param=source,
        )
    return wanted


def truncated(token_ids: list[int], limit: int | None, room: int) -> list[int]:
    """The last `limit` tokens of a prompt; with a limit of -1 as many as there is room for."""
    if limit is None:
        return token_ids
    return token_ids[-max(1, room if limit == -1 else limit) :]


def check_prompt_ids(token_ids: list[int], vocab_size: int) -> None:
    """Raises `InvalidRequestError` for an id that is no token."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    position = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
    raise InvalidRequestError(
        f"Invalid 'prompt': the token id at position {position} is not between 0 and {vocab_size - 1}.",
        param="prompt",
    )


class Completion:
    """A job under way: the engine's outputs become pieces of text."""

    def __init__(self, job: Job, generation: Generation) -> None:
        self._job = job
        self._generation = generation
        self._choices = [_Choice(job, index) for index in range(len(job.requests))]

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come; those that came together, together. Every choice ends with a finish reason.

        Raises:
            GatewayError: the engine refused a sequence or was lost.
        """
        while outputs := await self._next():
            pieces: list[Piece] = []
            for index, output in outputs:
                choice = self._choices[index]
                for part in _token_by_token(output):
                    if choice.finished:
                        break
                    pieces.append(choice.feed(part))
                    if choice.finished:
                        self._generation.finish(index)
            yield pieces

    async def _next(self) -> list[tuple[int, SequenceOutput]]:
        try:
            return await self._generation.next()
        except GrammarInvalidError as error:
            error.param = self._job.grammar_param
            raise

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self._job.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts; what a prompt's other choices reuse of its first is not counted."""
        return sum(choice.cached_tokens for choice in self._choices[:: self._job.n])


def _token_by_token(output: SequenceOutput) -> list[SequenceOutput]:
    """The engine may give several tokens at once; a stop string may end, or `min_tokens` be reached, among them."""
    last = len(output.token_ids) - 1
    if last < 1:
        return [output]
    return [
        msgspec.structs.replace(
            output,
            token_ids=[token_id],
            finish_reason=output.finish_reason if index == last else None,
            logprobs=None if output.logprobs is None else [output.logprobs[index]],
        )
        for index, token_id in enumerate(output.token_ids)
    ]


class _Choice:
    """The text of one sequence so far."""

    __slots__ = (
        "_detokenizer",
        "_job",
        "_length",
        "_min_tokens",
        "_pending",
        "_prompt",
        "_scores",
        "_shown",
        "_started",
        "_stops",
        "cached_tokens",
        "finished",
        "index",
        "num_tokens",
    )

    def __init__(self, job: Job, index: int) -> None:
        sampling = job.requests[index].sampling
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finished = False
        self._job = job
        self._prompt = job.prompts[index // job.n]
        self._detokenizer = Detokenizer(
            job.tokenizer, continues=job.continues, keep_special=job.keeps_special, keep=job.shown_special
        )
        self._stops = StopStrings(job.stops, keep=job.keeps_stop)
        self._min_tokens = sampling.min_tokens
        self._scores = sampling.logprobs is not None
        self._pending: list[ScoredToken] = []
        self._length = self._shown = len(self._prompt.echo or "")
        self._started = False

    def feed(self, output: SequenceOutput) -> Piece:
        text, tokens = "", []
        if not self._started:
            self._started = True
            self.cached_tokens = output.cached_tokens
            text, tokens = self._prompt.echo or "", self._score_prompt(output)
        if self._job.discards_output:
            self.finished = True
            return Piece(self.index, text, tokens, FinishReason.LENGTH)
        self.num_tokens += len(output.token_ids)
        reason = output.finish_reason
        shown = self._read(output)
        if reason is not None and not self._stops.found:
            rest = self._detokenizer.flush()
            shown += self._stops.feed(rest)
            if not self._stops.found:
                shown += self._stops.flush()
        if self._stops.found:
            reason = FinishReason.STOP
        self._shown += len(shown)
        self.finished = reason is not None
        return Piece(self.index, text + shown, tokens + self._take_scored(), reason)

    def _read(self, output: SequenceOutput) -> str:
        """The text to show for the output's tokens; remembers their scores."""
        if not self._scores:
            fresh = self._detokenizer.feed(output.token_ids)
        else:
            fresh = ""
            scores = output.logprobs or [None] * len(output.token_ids)
            for token_id, score in zip(output.token_ids, scores, strict=True):
                self._pending.append(self._scored(token_id, score, self._length + len(fresh)))
                fresh += self._detokenizer.feed([token_id])
        self._length += len(fresh)
        # A stop string counts only after min_tokens, as an end token does.
        return fresh if self.num_tokens <= self._min_tokens else self._stops.feed(fresh)

    def _take_scored(self) -> list[ScoredToken]:
        """Scores of the tokens whose text is shown; at the end the rest too, but not those of a stop string."""
        if self.finished and not self._stops.found:
            taken, self._pending = self._pending, []
            return taken
        taken = [token for token in self._pending if token.offset < self._shown]
        self._pending = self._pending[len(taken) :]
        return taken

    def _score_prompt(self, output: SequenceOutput) -> list[ScoredToken]:
        offsets = self._prompt.offsets
        if offsets is None:
            return []
        scores = output.prompt_logprobs or [None] * len(offsets)
        return [self._scored(*each) for each in zip(self._prompt.token_ids, scores, offsets, strict=True)]

    def _scored(self, token_id: int, score: TokenLogprobs | None, offset: int) -> ScoredToken:
        text, raw = self._token(token_id)
        if score is None:
            return ScoredToken(text, raw, None, [], offset, token_id)
        top = [(*self._token(other), max(logprob, MIN_LOGPROB)) for other, logprob in score.top]
        return ScoredToken(text, raw, max(score.logprob, MIN_LOGPROB), top, offset, token_id)

    def _token(self, token_id: int) -> tuple[str, bytes]:
        raw = self._job.tokenizer.bytes_of(token_id)
        return raw.decode(errors="replace"), raw
