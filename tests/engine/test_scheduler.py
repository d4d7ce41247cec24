"""The scheduler on its own: budgets, fairness, preemption, ends. No model: tokens are made up."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fake_runner import FakeRunner
from engine.kv_blocks import BlockPool
from engine.protocol import FinishReason, Generate, SamplingParams
from engine.scheduler import Progress, Scheduler
from engine.sequence import Sequence, SequenceState
from engine.step import StepPlan

EOS = 150


class Bench:
    """A scheduler with a fake runner behind it."""

    def __init__(
        self,
        blocks=64,
        block_size=4,
        max_batch_tokens=32,
        max_sequences=8,
        max_model_len=200,
        *,
        caching=True,
        alphabet: range | list[int] = range(100, 200),
        **options,
    ):
        self.pool = BlockPool(blocks, block_size, caching)
        self.runner = FakeRunner(blocks, block_size, alphabet=alphabet)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            **options,
        )
        self.sequences: list[Sequence] = []
        self.plans: list[StepPlan] = []

    def add(
        self,
        length: int,
        adapter: str | None = None,
        first: int = 1,
        *,
        leader: Sequence | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        seed: int = 0,
        **sampling,
    ) -> Sequence:
        params = SamplingParams(**{"max_tokens": 5, "ignore_eos": True, "temperature": 0.0, **sampling})
        key = len(self.sequences)
        prompt = [(first + index) % 90 + 1 for index in range(length)]
        request = Generate(str(key), prompt, params, priority=priority, tenant=tenant, cache_salt=cache_salt)
        sequence = Sequence(key=key, request=request, arrival_s=0.0, leader=leader, seed=seed)
        sequence.adapter_digest, sequence.slot = adapter, None if adapter is None else ord(adapter) - 97
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Progress]:
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        progress = self.scheduler.apply(plan, self.runner.run(plan)) if plan.chunks else []
        self.pool.check([sequence.block_table for sequence in self.sequences])
        return progress

    def run(self) -> list[Progress]:
        progress = []
        while self.scheduler.num_running or self.scheduler.num_waiting:
            progress += self.step()
            assert len(self.plans) < 5000, "no end"
        return progress


def test_a_prompt_is_cut_into_chunks_and_decodes_go_first():
    bench = Bench(max_batch_tokens=10, max_sequences=4)
    bench.add(3)
    bench.step()
    long = bench.add(25, first=50)
    bench.step()
    plan = bench.plans[-1]
    assert [(chunk.num_tokens, chunk.sequence is long) for chunk in plan.chunks] == [(1, False), (9, True)]
    assert not plan.chunks[1].samples


def test_every_sequence_gets_what_it_asked_for():
    bench = Bench()
    for index in range(12):
        bench.add(5 + index, first=index * 7, max_tokens=index + 1)
    bench.run()
    assert [sequence.num_generated for sequence in bench.sequences] == list(range(1, 13))
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in bench.sequences)
    assert bench.pool.num_available == 64


def test_preempted_sequences_give_the_same_tokens():
    roomy, tight = Bench(blocks=200), Bench(blocks=14)
    for bench in (roomy, tight):
        for index in range(4):
            bench.add(8, first=index * 20, max_tokens=20)
        bench.run()
    assert tight.scheduler.num_preemptions > 0
    for one, other in zip(roomy.sequences, tight.sequences, strict=True):
        assert one.token_ids == other.token_ids


def test_progress_is_reported_once_though_preempted():
    bench = Bench(blocks=14)
    for index in range(4):
        bench.add(8, first=index * 20, max_tokens=20)
    told: dict[int, list[int]] = {}
    for progress in bench.run():
        told.setdefault(progress.sequence.key, []).extend(progress.token_ids)
    assert bench.scheduler.num_preemptions > 0
    assert all(told[s.key] == s.token_ids[s.num_prompt_tokens :] for s in bench.sequences)


def test_cached_tokens_are_those_of_the_first_admission_though_preempted_before_the_first_token():
    bench = Bench(blocks=10, max_batch_tokens=3, max_sequences=3)
    bench.add(4, max_tokens=30)
    for _ in range(12):
        bench.step()
    late = bench.add(20, first=70, max_tokens=2)
    found_again = 0
    while late.state is not SequenceState.FINISHED:
        was_waiting = late.state is SequenceState.WAITING
        bench.step()
        chunks = [chunk for chunk in bench.plans[-1].chunks if chunk.sequence is late]
        if was_waiting and chunks:
            found_again = max(found_again, chunks[0].start)
    assert bench.scheduler.num_preemptions and found_again, "preempted, it finds its own blocks again"
    assert late.num_cached == 0


def steps_to_first_token(bench: Bench, sequence: Sequence) -> int:
    steps = 0
    while sequence.num_generated == 0:
        bench.step()
        steps += 1
        assert steps < 200
    return steps


@pytest.mark.parametrize("length", [6, 30, 100])
@pytest.mark.parametrize("flooding", [{"adapter": "a"}, {"adapter": "b", "tenant": "other"}])
@pytest.mark.parametrize("flood_length", [6, 90])
def test_a_flood_of_another_flow_costs_a_lone_request_two_steps_at_most(length, flooding, flood_length):
    alone = Bench(blocks=600)
    expected = steps_to_first_token(alone, alone.add(length, "b"))
    bench = Bench(blocks=600)
    for index in range(100):
        bench.add(flood_length, first=index, max_tokens=60, **flooding)
    for _ in range(12):
        bench.step()
    assert bench.scheduler.num_running >= 4
    # A long prompt shares the steps' tokens with the flood's answers, and half of the rest with its prompts.
    shared = 2 + (length > 32) * expected
    assert steps_to_first_token(bench, bench.add(length, "b", first=50)) <= expected + shared


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ac"), st.just(""), st.integers(1, 90), st.integers(1, 60)),
        min_size=60,
        max_size=100,
    ),
    st.integers(120, 600),
    st.integers(1, 20),
    st.integers(1, 30),
    st.sampled_from([0, 3]),
)
def test_whatever_two_flows_flood_a_lone_request_starts_within_two_steps(
    flood, blocks, length, after, guesses
):
    bench = Bench(blocks=blocks, speculative_tokens=guesses, speculative_ngram=1)
    for index, (adapter, tenant, prompt, answer) in enumerate(flood):
        bench.add(prompt, adapter, first=index, tenant=tenant, max_tokens=answer)
    for _ in range(after):
        bench.step()
    assert steps_to_first_token(bench, bench.add(length, "b", first=50)) <= 1 + 2


def test_flows_that_want_the_same_get_the_same():
    bench = Bench(blocks=600, max_sequences=6)
    for index in range(40):
        bench.add(20, "a", first=index, max_tokens=10)
        bench.add(20, "b", first=index, max_tokens=10)
        bench.add(20, "c", first=index, tenant="other", max_tokens=10)
    for _ in range(120):
        bench.step()
    served = Counter(s.flow for s in bench.sequences if s.state is SequenceState.FINISHED)
    assert min(served.values()) >= 8 and max(served.values()) - min(served.values()) <= 2


def test_a_flood_is_not_preempted_below_one_sequence_and_nobody_is_preempted_back():
    bench = Bench(blocks=600, max_sequences=3)
    for index in range(6):
        bench.add(4, "a", first=index, max_tokens=30)
    bench.step()
    for index in range(10):
        bench.add(4, chr(ord("b") + index), first=50, max_tokens=30)
    for _ in range(6):
        bench.step()
    assert bench.scheduler.num_preemptions == 2
    assert {chunk.sequence.adapter_digest for chunk in bench.plans[-1].chunks} == {"a", "b", "c"}
    bench.run()
    assert all(sequence.num_generated == 30 for sequence in bench.sequences)


def test_a_better_priority_goes_first_and_preempts_the_worse():
    bench = Bench(blocks=600, max_sequences=2)
    slow = [bench.add(4, first=index, max_tokens=50, priority=5) for index in range(4)]
    bench.step()
    urgent = bench.add(4, first=60, priority=-1)
    assert steps_to_first_token(bench, urgent) == 1
    assert bench.scheduler.num_preemptions == 1
    usual = bench.add(4, first=70, priority=0)
    assert steps_to_first_token(bench, usual) == 1
    bench.run()
    assert all(sequence.num_generated == 50 for sequence in slow)


def test_a_worse_priority_waits_for_all_the_better():
    bench = Bench(blocks=600, max_sequences=2)
    later = bench.add(4, "b", priority=1)
    for index in range(6):
        bench.add(4, "a", first=index, max_tokens=4)
    order = [progress.sequence for progress in bench.run() if progress.finish_reason]
    assert order[-1] is later


def test_a_worse_priority_is_not_begun_and_preempted_in_turns_while_a_better_waits_for_blocks():
    bench = Bench(blocks=30, max_sequences=4)
    for first in (1, 20):
        bench.add(40, "a", first=first, max_tokens=12)
    bench.step()
    bench.step()
    bench.step()
    large = bench.add(60, "a", first=50, max_tokens=2)
    small = bench.add(4, "b", first=70, priority=1, max_tokens=2)
    bench.run()
    assert bench.scheduler.num_preemptions == 0
    begun = [
        next(i for i, p in enumerate(bench.plans) if any(c.sequence is s for c in p.chunks))
        for s in (large, small)
    ]
    assert begun[0] <= begun[1]


def test_other_salts_share_no_prefix():
    bench = Bench()
    bench.add(16, cache_salt="one")
    bench.run()
    same, other, none = (bench.add(16, cache_salt=salt) for salt in ("one", "two", ""))
    bench.run()
    assert (same.num_cached, other.num_cached, none.num_cached) == (12, 0, 0)


@pytest.mark.parametrize("caching", [True, False])
def test_choices_that_follow_compute_the_prompt_once_and_share_its_blocks(caching):
    bench = Bench(caching=caching)
    leader = bench.add(18, temperature=1.0, seed=1)
    others = [bench.add(18, leader=leader, temperature=1.0, seed=seed) for seed in (2, 3, 4)]
    assert bench.scheduler.num_waiting == 4
    bench.step()
    bench.step()
    assert all(other.block_table[:4] == leader.block_table[:4] for other in others)
    assert all(other.block_table[4] != leader.block_table[4] for other in others)
    bench.run()
    computed = sum(chunk.num_tokens for plan in bench.plans for chunk in plan.chunks)
    assert computed == 18 + 3 * 2 + 4 * (5 - 1)  # the partly filled block is computed by each: 2 tokens
    for other in others:
        alone = Bench()
        twin = alone.add(18, temperature=1.0, seed=other.seed)
        alone.run()
        assert twin.token_ids == other.token_ids
    assert len({tuple(s.token_ids) for s in bench.sequences}) > 1


def test_a_choice_does_not_share_blocks_of_an_adapter_published_anew_since():
    bench = Bench()
    leader = bench.add(18, "a")
    bench.step()
    follower = bench.add(18, "b", leader=leader)
    bench.step()
    assert set(follower.block_table).isdisjoint(leader.block_table)
    assert bench.plans[-1].chunks[-1].num_tokens == 18


def test_a_chain_of_choices_is_not_kept_for_ever():
    bench = Bench()
    first = bench.add(4)
    second = bench.add(4, leader=first)
    bench.run()
    assert second.leader is None and second.num_generated == 5


def test_choices_that_follow_go_on_without_an_aborted_leader():
    bench = Bench()
    leader = bench.add(18)
    follower, aborted = bench.add(18, leader=leader), bench.add(18, leader=leader)
    bench.scheduler.abort(aborted)
    bench.scheduler.abort(leader)
    bench.run()
    assert follower.num_generated == 5 and bench.pool.num_available == 64


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}, {"logprobs": 1}])
def test_guesses_never_change_what_is_told(sampling):
    """Two tokens only, so that many guesses are right and many are wrong."""
    told = []
    for guesses in (0, 3):
        bench = Bench(blocks=60, alphabet=[7, 8], speculative_tokens=guesses, speculative_ngram=2)
        for index in range(5):
            bench.add(9, first=index, max_tokens=25, **sampling)
        answers: dict[int, tuple[list[int], int]] = {}
        for progress in bench.run():
            tokens, scores = answers.get(progress.sequence.key, ([], 0))
            scores += len(progress.logprobs or [])
            answers[progress.sequence.key] = tokens + progress.token_ids, scores
        told.append((answers, len(bench.plans)))
        assert bench.pool.num_available == 60
    assert told[0][0] == told[1][0]
    assert told[1][1] < told[0][1], "and it takes fewer steps"
    assert 0 < bench.scheduler.num_accepted < bench.scheduler.num_proposed


def test_an_end_token_among_right_guesses_ends_the_answer():
    def answer(guesses: int) -> tuple[list[int], FinishReason | None]:
        bench = Bench(alphabet=[7], speculative_tokens=guesses, speculative_ngram=1)
        sequence = bench.add(8, max_tokens=40, min_tokens=20, stop_token_ids=(7,))
        return [token for made in bench.run() for token in made.token_ids], sequence.finish_reason

    assert answer(0) == answer(4) == ([7] * 20, FinishReason.STOP)


def test_decodes_are_sorted_by_slot_with_the_base_first():
    bench = Bench()
    for adapter in ("c", None, "a", "b", "a"):
        bench.add(2, adapter)
    bench.step()
    bench.step()
    slots = [chunk.sequence.slot for chunk in bench.plans[-1].chunks]
    assert slots == [None, 0, 0, 1, 2]


def test_a_computed_prefix_is_reused_but_never_the_last_token():
    bench = Bench()
    bench.add(16)
    bench.run()
    again = bench.add(16)
    bench.step()
    assert again.num_cached == 12
    other = bench.add(16, "a")
    bench.step()
    assert other.num_cached == 0


def test_equal_prompts_of_one_step_do_not_share_what_is_not_computed():
    bench = Bench()
    first, second = bench.add(16), bench.add(16)
    bench.step()
    assert set(first.block_table).isdisjoint(second.block_table)


def test_abort_frees_its_blocks():
    bench = Bench(max_sequences=1)
    running, waiting = bench.add(10), bench.add(10)
    bench.step()
    bench.scheduler.abort(running)
    bench.scheduler.abort(waiting)
    assert bench.pool.num_available == 64
    assert running.state is waiting.state is SequenceState.FINISHED
    assert not bench.scheduler.schedule().chunks


def test_end_tokens():
    def answer(**sampling) -> tuple[list[int], FinishReason | None]:
        bench = Bench()
        sequence = bench.add(4, max_tokens=8, **sampling)
        told = [token for progress in bench.run() for token in progress.token_ids]
        return told, sequence.finish_reason

    whole, reason = answer()
    assert (len(whole), reason) == (8, FinishReason.LENGTH)
    end = whole[2]
    first = whole.index(end)
    assert answer(stop_token_ids=(end,)) == (whole[:first], FinishReason.STOP)
    assert answer(stop_token_ids=(end,), min_tokens=8) == (whole, FinishReason.LENGTH)


def test_the_model_length_ends_a_sequence():
    bench = Bench(max_model_len=20)
    sequence = bench.add(15, max_tokens=100)
    bench.run()
    assert (sequence.num_generated, sequence.finish_reason) == (5, FinishReason.LENGTH)


def test_a_pool_smaller_than_the_model_length_ends_a_sequence_too():
    bench = Bench(blocks=3, block_size=4, max_model_len=100)
    sequence = bench.add(5, max_tokens=100)
    bench.run()
    assert len(sequence.token_ids) == bench.scheduler.max_len == 12


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 30),
            st.integers(1, 15),
            st.sampled_from([None, "a", "b"]),
            st.integers(0, 3),
            st.integers(0, 1),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(12, 40),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([0, 3]),
    st.randoms(use_true_random=False),
)
def test_whatever_comes_everybody_ends_and_nothing_leaks(
    requests, blocks, budget, sequences, guesses, random
):
    bench = Bench(
        blocks=blocks,
        max_batch_tokens=max(budget, sequences),
        max_sequences=sequences,
        alphabet=[7, 8, 9],
        speculative_tokens=guesses,
        speculative_ngram=1,
    )
    pending = list(requests)
    while pending or bench.scheduler.num_running or bench.scheduler.num_waiting:
        if pending:
            length, count, adapter, first, priority, follows = pending.pop()
            length = min(length, bench.scheduler.max_len - 1)
            leader = bench.sequences[-1] if follows and bench.sequences else None
            if leader is not None:
                length, first, adapter = (
                    leader.num_prompt_tokens,
                    leader.request.prompt[0] - 1,
                    leader.adapter_digest,
                )
            bench.add(length, adapter, first, leader=leader, priority=priority, max_tokens=count)
        if random.random() < 0.1:
            victim = random.choice(bench.sequences)
            if victim.state in (SequenceState.RUNNING, SequenceState.WAITING):
                bench.scheduler.abort(victim)
        bench.step()
        plan = bench.plans[-1]
        assert plan.num_tokens <= bench.scheduler._max_batch_tokens
        assert len({chunk.sequence.key for chunk in plan.chunks}) == len(plan.chunks) <= sequences
        assert plan.chunks or not bench.scheduler.num_running
        assert len(bench.plans) < 3000
    assert bench.pool.num_available == blocks
    assert bench.scheduler.num_waiting == 0 and not bench.scheduler._flows
    for sequence in bench.sequences:
        if sequence.finish_reason is FinishReason.LENGTH:
            limit = min(
                sequence.request.sampling.max_tokens, bench.scheduler.max_len - sequence.num_prompt_tokens
            )
            assert sequence.num_generated == limit
            alone = Bench(blocks=200, max_model_len=bench.scheduler.max_len, alphabet=[7, 8, 9])
            twin = alone.add(
                sequence.num_prompt_tokens,
                sequence.adapter_digest,
                sequence.request.prompt[0] - 1,
                max_tokens=limit,
            )
            alone.run()
            assert twin.token_ids == sequence.token_ids
