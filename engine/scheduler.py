"""Which tokens of which sequences the next step computes. Pure: no torch, no clock, no I/O.

Decodes come first, one token each. What is left of the step's token budget goes to prompts, under way or new, by
deficit round robin over flows (Shreedhar and Varghese, 1995); a flow is one tenant's use of one adapter. Prompt tokens
are charged to the flow when they are computed and output tokens when they are sampled, so a flow that generates much
is in debt and waits; as in FQ-CoDel (RFC 8290) a flow that was idle goes first. A request of a flow that has nothing
running never waits for a slot or for blocks that a flow with two or more sequences holds: the latest of those is
preempted. Requests of a better priority go before all of this, and may preempt the worse; while one of them waits for
blocks, none of a worse priority is begun.

Preemption is by recomputation: the blocks go back (the full ones stay in the prefix cache as long as they are not
needed), the tokens are kept, and the sequence is computed again when there is room.
"""

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.kv_blocks import BlockPool
from engine.prompt_lookup import propose
from engine.protocol import FinishReason, TokenLogprobs
from engine.sequence import Flow, Sequence, SequenceState
from engine.step import Chunk, ChunkResult, StepPlan, StepResult

DEEPEST_DEBT = 4
"""In quanta. What a flow has had beyond its share counts against it up to here, so that it is heard again soon."""


@dataclass(slots=True, frozen=True)
class Progress:
    """What one step added to one sequence; the end token is not in `token_ids`."""

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None


@dataclass(slots=True)
class FlowQueue:
    """A flow's waiting sequences, best priority and earliest arrival first, and how many of its sequences run."""

    deficit: int
    """Tokens it may be given before its turn is over; negative when it has had more than its share."""
    waiting: list[Sequence] = field(default_factory=list)
    running: int = 0
    fresh: bool = True
    """Nothing was given to it yet since it was idle."""


class Scheduler:
    """Owns the queues, the running list and the block tables of its sequences.

    Args:
        speculative_tokens: Tokens guessed for a decode at most; 0 switches guessing off.
        speculative_ngram: Tokens that must have come before for a guess.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        speculative_tokens: int = 0,
        speculative_ngram: int = 3,
    ) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self.max_len = min(max_model_len, pool.num_blocks * pool.block_size)
        """Tokens a sequence can reach; it finishes with LENGTH there."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._speculative_tokens = speculative_tokens
        self._speculative_ngram = speculative_ngram
        self._quantum = max_batch_tokens  # a turn finishes most prompts: in slices all would be late together
        self._flows: OrderedDict[Flow, FlowQueue] = OrderedDict()
        """In the order of their turns."""
        self._running: list[Sequence] = []
        """In the order of admission."""
        self._preempted: set[int] = set()
        """Keys of the sequences that have been preempted: what they then find in the cache may be their own."""
        self._preempted_now: set[int] = set()
        """Of them, those that the step being planned has preempted: it does not admit them again."""
        self.num_waiting = 0
        self.num_preemptions = 0
        self.num_proposed = 0
        """Tokens guessed so far, and of them those that were right."""
        self.num_accepted = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose adapter (if any) is resident. Its prompt must be shorter than `max_len`."""
        sequence.state = SequenceState.WAITING
        self.num_waiting += 1
        leader = sequence.leader
        if leader is not None and leader.is_computing_prompt:
            leader.followers.append(sequence)
        else:
            self._enqueue(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.num_waiting -= 1
            if sequence.leader is not None and sequence in sequence.leader.followers:
                sequence.leader.followers.remove(sequence)
            else:
                self._flows[sequence.flow].waiting.remove(sequence)
                self._tidy(sequence.flow)
        self._finish(sequence, None)

    def schedule(self) -> StepPlan:
        """Decide the next step and reserve its blocks. An empty plan means there is nothing to do."""
        self._preempted_now.clear()
        decoding = [sequence for sequence in self._running if sequence.num_uncomputed == 1]
        decodes: list[Chunk] = []
        spare = self._max_batch_tokens - len(decoding)
        for sequence in decoding:
            if sequence.state is not SequenceState.RUNNING:
                continue
            if not self._reserve(sequence, sequence.num_computed + 1):
                continue
            draft = self._draft(sequence, spare)
            spare -= len(draft)
            self._charge(sequence, 1)
            decodes.append(Chunk(sequence, sequence.num_computed, 1 + len(draft), draft))
        grants = self._share(spare, admit=not self._preempted_now)
        # A sequence may have been preempted to make room for another after its chunk was planned.
        running = [chunk for chunk in decodes if chunk.sequence.state is SequenceState.RUNNING]
        running.sort(key=lambda chunk: -1 if chunk.sequence.slot is None else chunk.sequence.slot)
        prefills = [
            Chunk(sequence, sequence.num_computed, count)
            for sequence, count in grants.items()
            if count and sequence.state is SequenceState.RUNNING
        ]
        return StepPlan(running + prefills)

    def _share(self, budget: int, *, admit: bool) -> dict[Sequence, int]:
        """Give `budget` tokens to prompts, flow after flow; how many each sequence gets."""
        grants: dict[Sequence, int] = {}
        closed: set[Flow] = set() if admit else set(self._flows)
        while budget > 0 and (wanting := self._wanting(grants, closed)):
            sequence = self._turn(wanting)
            flow = self._flows[sequence.flow]
            if sequence.state is SequenceState.WAITING and not self._admit(sequence):
                closed |= self._closed_behind(sequence)
                continue
            given = grants.get(sequence, 0)
            turn = budget if len(wanting) == 1 else max(1, flow.deficit)
            count = min(sequence.num_uncomputed - given, budget, turn)
            grants[sequence] = given + count
            self._charge(sequence, count)
            budget -= count
        return grants

    def _closed_behind(self, sequence: Sequence) -> set[Flow]:
        """The flows that may begin nothing while this sequence waits for room: they would take it, step after step.

        All of them when its own flow has nothing running, else its own and those whose next matters less.
        """
        if self._flows[sequence.flow].running == 0:
            return set(self._flows)
        return {
            flow
            for flow, queue in self._flows.items()
            if queue.waiting
            and (flow == sequence.flow or queue.waiting[0].request.priority > sequence.request.priority)
        }

    def _wanting(self, grants: dict[Sequence, int], closed: set[Flow]) -> dict[Flow, Sequence]:
        """The sequence of each flow whose prompt is next, of the best priority that wants anything.

        Within a flow a prompt that is under way is finished before another is begun, unless it matters less.
        """
        wanting: dict[Flow, Sequence] = {}
        for sequence in self._running:
            if sequence.num_uncomputed > max(1, grants.get(sequence, 0)):
                first = wanting.get(sequence.flow)
                if first is None or sequence.rank < first.rank:
                    wanting[sequence.flow] = sequence
        for flow, queue in self._flows.items():
            if not queue.waiting or flow in closed or queue.waiting[0].key in self._preempted_now:
                continue
            begun, head = wanting.get(flow), queue.waiting[0]
            if begun is None or head.request.priority < begun.request.priority:
                wanting[flow] = head
        best = min((sequence.request.priority for sequence in wanting.values()), default=0)
        return {flow: sequence for flow, sequence in wanting.items() if sequence.request.priority == best}

    def _turn(self, wanting: dict[Flow, Sequence]) -> Sequence:
        """Whose turn it is. Turns the round on past flows that have had their share."""
        for flow, queue in self._flows.items():
            if queue.fresh and flow in wanting:
                return wanting[flow]
        while True:
            for flow in [flow for flow in self._flows if flow in wanting]:
                queue = self._flows[flow]
                if queue.deficit > 0 or len(wanting) == 1:
                    return wanting[flow]
                queue.deficit += self._quantum
                self._flows.move_to_end(flow)

    def _draft(self, sequence: Sequence, spare: int) -> tuple[int, ...]:
        """Guessed tokens to check beside the next one; only into blocks that nobody has to give up."""
        if not self._speculative_tokens or sequence.constraint is not None or sequence.request.pooling:
            return ()
        sampling = sequence.request.sampling
        room = min(sampling.max_tokens - sequence.num_generated, self.max_len - len(sequence.token_ids)) - 1
        count = min(self._speculative_tokens, spare, room)
        draft = propose(sequence.token_ids, self._speculative_ngram, count)
        missing = self._pool.blocks_for(len(sequence.token_ids) + len(draft)) - len(sequence.block_table)
        if missing > 0:
            blocks = self._pool.allocate(missing) if missing < self._pool.num_available else None
            if blocks is None:
                return ()
            sequence.block_table.extend(blocks)
        return draft

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence the blocks for its first `num_tokens`, preempting others, or itself."""
        while True:
            missing = self._pool.blocks_for(num_tokens) - len(sequence.block_table)
            if missing <= 0:
                return True
            blocks = self._pool.allocate(missing)
            if blocks is not None:
                sequence.block_table.extend(blocks)
                return True
            order = {running.key: index for index, running in enumerate(self._running)}
            victim = max(self._running, key=lambda running: (running.request.priority, order[running.key]))
            self._preempt(victim)
            if victim is sequence:
                return False

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._flows[sequence.flow].running -= 1
        self._pool.release(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed = 0
        if sequence.num_generated == 0:
            sequence.prompt_logprobs.clear()
            sequence.pooled = None
        sequence.state = SequenceState.WAITING
        self._preempted.add(sequence.key)
        self._preempted_now.add(sequence.key)
        self.num_preemptions += 1
        self.num_waiting += 1
        self._enqueue(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence with blocks for all its tokens, if need be at the cost of others."""
        pool = self._pool
        # The last token is always computed: its logits are wanted.
        reusable = (len(sequence.token_ids) - 1) // pool.block_size
        wants_all = sequence.request.sampling.prompt_logprobs is not None and sequence.num_generated == 0
        if wants_all or sequence.request.pooling == "mean":
            reusable = 0
        pool.extend_keys(sequence.block_keys, sequence.cache_root, sequence.token_ids, reusable)
        cached = self._reused(sequence, reusable)
        pool.hold(cached)
        missing = pool.blocks_for(len(sequence.token_ids)) - len(cached)
        while not self._fits(missing):
            victim = self._victim_for(sequence)
            if victim is None:
                pool.release(cached)
                return False
            self._preempt(victim)
        blocks = pool.allocate(missing)
        if blocks is None:
            raise ValueError("blocks that were free are not")
        self.num_waiting -= 1
        queue = self._flows[sequence.flow]
        queue.waiting.remove(sequence)
        queue.running += 1
        sequence.block_table = cached + blocks
        sequence.num_computed = len(cached) * pool.block_size
        if sequence.key not in self._preempted:
            sequence.num_cached = sequence.num_computed
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)
        return True

    def _reused(self, sequence: Sequence, most: int) -> list[int]:
        """Blocks that hold the beginning of its tokens: the prefix cache's, or those of the choice it follows."""
        cached = self._pool.match(sequence.block_keys[:most])
        leader = sequence.leader
        if leader is not None and leader.state is SequenceState.RUNNING:
            shared = leader.block_table[: min(most, leader.num_computed // self._pool.block_size)]
            # The adapter may have been published anew between the two.
            same = leader.cache_root == sequence.cache_root and sequence.num_generated == 0
            if same and len(shared) > len(cached):
                return shared
        return cached

    def _fits(self, missing: int) -> bool:
        # One block more for each running sequence, so that admitting this one does not soon preempt another.
        enough = missing + len(self._running) <= self._pool.num_available
        return enough and len(self._running) < self._max_sequences

    def _victim_for(self, sequence: Sequence) -> Sequence | None:
        """The running sequence that has to make room for this one, or None: it has to wait.

        The worst priority first, then the flow with the most sequences, then the latest. Of its own priority only
        from a flow that keeps at least one, and only for a flow that has none: so nobody is preempted back.
        """
        first = self._flows[sequence.flow].running == 0
        counts = Counter(running.flow for running in self._running)
        eligible = [
            (running.request.priority, counts[running.flow], index, running)
            for index, running in enumerate(self._running)
            if running.request.priority > sequence.request.priority
            or (first and running.request.priority == sequence.request.priority and counts[running.flow] >= 2)
        ]
        return max(eligible, key=lambda each: each[:3])[3] if eligible else None

    def apply(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        """Record what a step computed; what to tell the clients."""
        progress = []
        for chunk, found in zip(plan.chunks, result.results, strict=True):
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens - len(chunk.draft)
            if found.prompt_logprobs and sequence.num_generated == 0:
                sequence.prompt_logprobs.extend(found.prompt_logprobs)
            if found.pooled is not None:
                sequence.pooled = found.pooled if sequence.pooled is None else sequence.pooled + found.pooled
            if sequence.request.pooling is not None and chunk.samples:
                sequence.finish_reason = FinishReason.STOP
                progress.append(Progress(sequence, [], None, FinishReason.STOP))
            if found.token_ids:
                progress.append(self._advance(chunk, found))
            self._register(sequence, chunk)
            if not sequence.is_computing_prompt:
                self._release_followers(sequence)
            if sequence.finish_reason is not None:
                self._leave(sequence)
                self._finish(sequence, sequence.finish_reason)
        return progress

    def _advance(self, chunk: Chunk, found: ChunkResult) -> Progress:
        """Append what was sampled, up to the sequence's end."""
        sequence, shown = chunk.sequence, 0
        for count, token_id in enumerate(found.token_ids):
            sequence.finish_reason = self._append(sequence, token_id)
            sequence.num_computed += count > 0  # a right guess has its keys and values in the pages already
            shown += sequence.finish_reason is not FinishReason.STOP
            if sequence.finish_reason is not None:
                break
        if found.complete:
            sequence.finish_reason = FinishReason.STOP
        self.num_proposed += len(chunk.draft)
        self.num_accepted += len(found.token_ids) - 1
        self._charge(sequence, shown - 1)
        scores = None if found.logprobs is None else found.logprobs[:shown]
        return Progress(sequence, found.token_ids[:shown], scores, sequence.finish_reason)

    def _register(self, sequence: Sequence, chunk: Chunk) -> None:
        """Offer the blocks that this chunk filled to the prefix cache."""
        size = self._pool.block_size
        first, full = chunk.start // size, sequence.num_computed // size
        if first == full:
            return
        self._pool.extend_keys(sequence.block_keys, sequence.cache_root, sequence.token_ids, full)
        for index in range(first, full):
            self._pool.register(sequence.block_table[index], sequence.block_keys[index])

    def _append(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        sequence.token_ids.append(token_id)
        is_eos = token_id in self._eos_token_ids
        if is_eos and sequence.constraint is not None:
            return FinishReason.STOP  # the grammar has allowed it here
        ends = token_id in sampling.stop_token_ids or (is_eos and not sampling.ignore_eos)
        if ends and sequence.num_generated > sampling.min_tokens:
            return FinishReason.STOP
        if sequence.num_generated >= sampling.max_tokens or len(sequence.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None

    def _enqueue(self, sequence: Sequence) -> None:
        queue = self._flows.get(sequence.flow)
        if queue is None:
            queue = self._flows[sequence.flow] = FlowQueue(deficit=self._quantum)
        insort(queue.waiting, sequence, key=lambda waiting: waiting.rank)

    def _charge(self, sequence: Sequence, num_tokens: int) -> None:
        queue = self._flows[sequence.flow]
        queue.fresh = False
        queue.deficit = max(queue.deficit - num_tokens, -DEEPEST_DEBT * self._quantum)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running list."""
        self._running.remove(sequence)
        self._flows[sequence.flow].running -= 1
        self._tidy(sequence.flow)

    def _tidy(self, flow: Flow) -> None:
        queue = self._flows[flow]
        if not queue.waiting and not queue.running:
            del self._flows[flow]

    def _release_followers(self, sequence: Sequence) -> None:
        followers, sequence.followers = sequence.followers, []
        for follower in followers:
            self._enqueue(follower)

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.leader = None
        self._preempted.discard(sequence.key)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        self._release_followers(sequence)
