"""One request inside the engine: its tokens, its KV blocks, where it stands. Knows no tensors and no sockets."""

import hashlib
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from engine.protocol import FinishReason, Generate, TokenLogprobs

if TYPE_CHECKING:
    from engine.grammar import Constraint

Flow = tuple[str, str | None]
"""Who shares a turn with whom: (tenant, adapter digest)."""


class SequenceState(Enum):
    """WAITING_ADAPTER -> WAITING -> RUNNING -> FINISHED; RUNNING -> WAITING by preemption; any -> FINISHED by abort."""

    WAITING_ADAPTER = auto()
    """Not with the scheduler yet."""
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens are `token_ids`; the KV of the first `num_computed` of them is in the blocks of `block_table`."""

    key: int
    """Unique in the engine (request ids are only unique in one connection)."""
    request: Generate
    arrival_s: float
    connection: int = 0
    """Which gateway connection gets the output."""
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first admitted."""
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of the full blocks hashed so far."""
    adapter_digest: str | None = None
    """Identity of the adapter's content; None for the base model. Part of every prefix-cache key."""
    leader: "Sequence | None" = None
    """The choice of the same request whose prompt blocks this one shares; it waits until they are computed."""
    followers: list["Sequence"] = field(default_factory=list)
    """Those that wait for this one's prompt."""
    slot: int | None = None
    """The adapter's device slot while resident; None for the base model."""
    seed: int = 0
    """The request's seed, or one the engine drew."""
    constraint: "Constraint | None" = None
    """Where it stands in its grammar, when it has one."""
    state: SequenceState = SequenceState.WAITING_ADAPTER
    has_run: bool = False
    """Whether it was in a step."""
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """Filled while the prompt is computed, when asked for."""
    pooled: Any = None
    """[hidden] the sum so far of what the request wants pooled (a numpy array, float32)."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.request.prompt)
            self.num_prompt_tokens = len(self.token_ids)

    @property
    def flow(self) -> Flow:
        return self.request.tenant, self.adapter_digest

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: by priority, then by arrival."""
        return self.request.priority, self.key

    @property
    def cache_root(self) -> bytes:
        """What the first prefix-cache key is derived from: sequences that differ here never share a block."""
        root = f"{self.adapter_digest or ''}|{self.request.cache_salt}"
        # Hashed apart from the blocks' keys, so that no salt can be made to look like one of them.
        return hashlib.blake2b(root.encode(errors="surrogatepass"), digest_size=16, person=b"root").digest()

    @property
    def is_computing_prompt(self) -> bool:
        """Whether its first token is still to come."""
        return self.state is not SequenceState.FINISHED and self.num_generated == 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is not in the cache yet: the rest of the prompt, or the one last sampled."""
        return len(self.token_ids) - self.num_computed
