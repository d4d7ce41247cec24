"""What one engine step computes and what comes out: the contract between scheduler, runner and loop.

A `StepPlan` is decided by the scheduler, executed by a runner, and its `StepResult` applied by the loop. A
runner only reads the sequences; it never changes them.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

from engine.protocol import TokenLogprobs
from engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class Chunk:
    """`num_tokens` tokens of one sequence, from position `start`; blocks for all of them are in its table."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()
    """Guesses of the tokens after the sequence's last, computed in the chunk's last rows and kept while right."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the chunk's rows."""
        known = self.sequence.token_ids[self.start : self.start + self.num_tokens]
        return [*known, *self.draft] if self.draft else known

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a next token is sampled."""
        return self.start + self.num_tokens - len(self.draft) == len(self.sequence.token_ids)


@dataclass(slots=True, frozen=True)
class StepPlan:
    """Chunks in the order of the batch: decodes (one token) first, then prefill chunks."""

    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(slots=True, frozen=True)
class ChunkResult:
    """What a chunk gave."""

    token_ids: list[int]
    """The sampled tokens: none for a chunk that does not sample; else one, and one more for each guess in a row that
    was what would have been sampled."""
    logprobs: list[TokenLogprobs] | None = None
    """Of each of them, when asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """The next entries of the prompt's list, to be appended: the chunk's rows give positions start+1 ..
    start+num_tokens (as far as the prompt goes), and a chunk that starts at 0 puts None for position 0 first.
    Only when the request asks for them."""
    complete: bool = False
    """Whether the sequence's grammar allows nothing but the end after the last token: it ends with it."""
    error: str | None = None
    """Why the sequence cannot go on, for the caller; nothing was sampled then."""
    pooled: Any = None
    """[hidden] to be added to what the request wants pooled (a numpy array, float32), when it wants that."""


@dataclass(slots=True, frozen=True)
class StepResult:
    """One result per chunk, in the plan's order."""

    results: SequenceOf[ChunkResult]


class Runner(Protocol):
    """Executes plans. `ModelRunner` does it with torch; `FakeRunner` speaks the same interface without a model."""

    num_blocks: int
    block_size: int

    def enter_loop_thread(self) -> None:
        """Called first thing on the loop's thread."""
        ...

    def enter_loader_thread(self) -> None:
        """Called first thing on every loader thread, which must leave the processors to the loop's."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step. Called from the loop's thread only."""
        ...

    def prepare_adapter(self, adapter: Any) -> Any:
        """Host form -> device form of an adapter (slow part; called from a loader thread)."""
        ...

    def install_adapter(self, slot: int, prepared: Any) -> None:
        """Make a prepared adapter usable in `slot` (fast; called from the loop's thread between steps)."""
        ...

    def remove_adapter(self, slot: int) -> None:
        """Forget the adapter in `slot` (called from the loop's thread between steps)."""
        ...
