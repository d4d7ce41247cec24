"""The scheduler on its own: budgets, fairness, preemption, ends. No model: tokens are made up."""

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

    def __init__(self, blocks=64, block_size=4, max_batch_tokens=32, max_sequences=8, max_model_len=200):
        self.pool = BlockPool(blocks, block_size)
        self.runner = FakeRunner(blocks, block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
        )
        self.sequences: list[Sequence] = []
        self.plans: list[StepPlan] = []

    def add(self, length: int, adapter: str | None = None, first: int = 1, **sampling) -> Sequence:
        params = SamplingParams(**{"max_tokens": 5, "ignore_eos": True, "temperature": 0.0, **sampling})
        key = len(self.sequences)
        prompt = [(first + index) % 90 + 1 for index in range(length)]
        sequence = Sequence(key=key, request=Generate(str(key), prompt, params), arrival_s=0.0)
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


def test_a_flood_on_one_adapter_does_not_starve_another():
    bench = Bench(blocks=400, max_sequences=4)
    for index in range(50):
        bench.add(6, "a", first=index)
    bench.step()
    lonely = bench.add(6, "b")
    steps = 0
    while lonely.num_generated == 0:
        bench.step()
        steps += 1
    assert steps <= 7  # one generation of `a` has to end first: max_tokens is 5


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


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 30), st.integers(1, 15), st.sampled_from([None, "a", "b"]), st.integers(0, 3)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(12, 40),
    st.integers(1, 20),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_whatever_comes_everybody_ends_and_nothing_leaks(requests, blocks, budget, sequences, random):
    bench = Bench(blocks=blocks, max_batch_tokens=max(budget, sequences), max_sequences=sequences)
    pending = list(requests)
    while pending or bench.scheduler.num_running or bench.scheduler.num_waiting:
        if pending:
            length, count, adapter, first = pending.pop()
            bench.add(min(length, bench.scheduler.max_len - 1), adapter, first, max_tokens=count)
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
    for sequence in bench.sequences:
        if sequence.finish_reason is FinishReason.LENGTH:
            limit = min(
                sequence.request.sampling.max_tokens, bench.scheduler.max_len - sequence.num_prompt_tokens
            )
            assert sequence.num_generated == limit
