"""Which tokens of which sequences the next step computes. Pure: no torch, no clock, no I/O.

Decodes come first, then the prompts that are under way, then new ones, all under one token budget. New sequences
are taken in turn from the adapters' queues, so a flood on one adapter delays another's request by one sequence, not
by the flood. When blocks run out the youngest running sequence is preempted: its blocks go back (its full ones stay
in the prefix cache), its tokens are kept, and it is computed again when there is room.
"""

from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass

from engine.kv_blocks import BlockPool
from engine.protocol import FinishReason, TokenLogprobs
from engine.sequence import Sequence, SequenceState
from engine.step import Chunk, StepPlan, StepResult


@dataclass(slots=True, frozen=True)
class Progress:
    """What one step added to one sequence; the end token is not in `token_ids`."""

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None


class Scheduler:
    """Owns the queue, the running list and the block tables of its sequences."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self.max_len = min(max_model_len, pool.num_blocks * pool.block_size)
        """Tokens a sequence can reach; it finishes with LENGTH there."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._queues: OrderedDict[str | None, deque[Sequence]] = OrderedDict()
        self._running: list[Sequence] = []
        self._preempted: set[int] = set()
        """Keys of the sequences that have been preempted: what they then find in the cache may be their own."""
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose adapter (if any) is resident. Its prompt must be shorter than `max_len`."""
        sequence.state = SequenceState.WAITING
        self._queues.setdefault(sequence.adapter_digest, deque()).append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            queue = self._queues[sequence.adapter_digest]
            queue.remove(sequence)
            if not queue:
                del self._queues[sequence.adapter_digest]
        self._finish(sequence, None)

    def schedule(self) -> StepPlan:
        """Decide the next step and reserve its blocks. An empty plan means there is nothing to do."""
        budget = self._max_batch_tokens
        preemptions = self.num_preemptions
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        for sequence in list(self._running):
            if sequence.state is not SequenceState.RUNNING or budget == 0:
                continue
            count = min(sequence.num_uncomputed, budget)
            if not self._reserve(sequence, sequence.num_computed + count):
                continue
            (decodes if sequence.num_uncomputed == 1 else prefills).append(
                Chunk(sequence, sequence.num_computed, count)
            )
            budget -= count
        while budget and preemptions == self.num_preemptions and (sequence := self._admit()) is not None:
            count = min(sequence.num_uncomputed, budget)
            prefills.append(Chunk(sequence, sequence.num_computed, count))
            budget -= count
        # A later sequence may have been preempted to make room for an earlier one, after its chunk was planned.
        running = [chunk for chunk in decodes if chunk.sequence.state is SequenceState.RUNNING]
        running.sort(key=lambda chunk: -1 if chunk.sequence.slot is None else chunk.sequence.slot)
        return StepPlan(
            running + [chunk for chunk in prefills if chunk.sequence.state is SequenceState.RUNNING]
        )

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence the blocks for its first `num_tokens`, preempting younger ones, or itself."""
        while True:
            missing = self._pool.blocks_for(num_tokens) - len(sequence.block_table)
            if missing <= 0:
                return True
            blocks = self._pool.allocate(missing)
            if blocks is not None:
                sequence.block_table.extend(blocks)
                return True
            youngest = self._running.pop()
            self._preempt(youngest)
            if youngest is sequence:
                return False

    def _preempt(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed = 0
        if sequence.num_generated == 0:
            sequence.prompt_logprobs.clear()
        sequence.state = SequenceState.WAITING
        self._preempted.add(sequence.key)
        self.num_preemptions += 1
        self._queues.setdefault(sequence.adapter_digest, deque()).appendleft(sequence)
        self._queues.move_to_end(sequence.adapter_digest, last=False)

    def _admit(self) -> Sequence | None:
        """Start the next waiting sequence with blocks for all its tokens; None if none may start now."""
        if not self._queues or len(self._running) >= self._max_sequences:
            return None
        digest, queue = next(iter(self._queues.items()))
        sequence, pool = queue[0], self._pool
        # The last token is always computed: its logits are wanted.
        reusable = (len(sequence.token_ids) - 1) // pool.block_size
        if sequence.request.sampling.prompt_logprobs is not None and sequence.num_generated == 0:
            reusable = 0
        pool.extend_keys(sequence.block_keys, digest, sequence.token_ids, reusable)
        cached = pool.match(sequence.block_keys[:reusable])
        pool.hold(cached)
        missing = pool.blocks_for(len(sequence.token_ids)) - len(cached)
        # One block more for each running sequence, so that admitting this one does not soon preempt another.
        blocks = pool.allocate(missing) if missing + len(self._running) <= pool.num_available else None
        if blocks is None:
            pool.release(cached)
            return None
        queue.popleft()
        if queue:
            self._queues.move_to_end(digest)
        else:
            del self._queues[digest]
        sequence.block_table = cached + blocks
        sequence.num_computed = len(cached) * pool.block_size
        if sequence.key not in self._preempted:
            sequence.num_cached = sequence.num_computed
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)
        return sequence

    def apply(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        """Record what a step computed; what to tell the clients."""
        progress = []
        for chunk, found in zip(plan.chunks, result.results, strict=True):
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            self._register(sequence, chunk)
            if found.prompt_logprobs and sequence.num_generated == 0:
                sequence.prompt_logprobs.extend(found.prompt_logprobs)
            if found.token_id is None:
                continue
            reason = self._append(sequence, found.token_id)
            stopped = reason is FinishReason.STOP
            tokens = [] if stopped else [found.token_id]
            logprobs = None if found.logprobs is None else [] if stopped else [found.logprobs]
            progress.append(Progress(sequence, tokens, logprobs, reason))
            if reason is not None:
                self._running.remove(sequence)
                self._finish(sequence, reason)
        return progress

    def _register(self, sequence: Sequence, chunk: Chunk) -> None:
        """Offer the blocks that this chunk filled to the prefix cache."""
        size = self._pool.block_size
        first, full = chunk.start // size, sequence.num_computed // size
        self._pool.extend_keys(sequence.block_keys, sequence.adapter_digest, sequence.token_ids, full)
        for index in range(first, full):
            self._pool.register(sequence.block_table[index], sequence.block_keys[index])

    def _append(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        sequence.token_ids.append(token_id)
        ends = token_id in sampling.stop_token_ids or (
            token_id in self._eos_token_ids and not sampling.ignore_eos
        )
        if ends and sequence.num_generated > sampling.min_tokens:
            return FinishReason.STOP
        if sequence.num_generated >= sampling.max_tokens or len(sequence.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = []
        self._preempted.discard(sequence.key)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
