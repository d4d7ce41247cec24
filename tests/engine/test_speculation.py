"""Guesses, shared blocks, the prefix cache, preemption: none of them changes an answer. Toy model, real sampler."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_blocks import BlockPool
from engine.protocol import Generate, SamplingParams, TokenLogprobs
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState
from tests.engine.paged_runner import EOS, VOCABULARY, PagedRunner, alone

TEMPLATES = ([1, 2, 3, 4, 5, 6] * 3, [3, 1] * 8, [2] * 5)

sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20),
    min_tokens=st.sampled_from([0, 0, 3]),
    temperature=st.sampled_from([0.0, 0.5, 1.2]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    presence_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([{}, {3: 1.5}]),
    logprobs=st.sampled_from([None, None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (5,)]),
)
requests = st.tuples(
    st.sampled_from(TEMPLATES),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    sampling_params,
    st.sampled_from([None, "a", "b"]),
    st.integers(0, 1),
    st.sampled_from(["", "", "salt"]),
    st.booleans(),
)


class Trial:
    """Scheduler and toy model; what every sequence was told."""

    def __init__(self, blocks: int, budget: int, sequences: int, guesses: int, ngram: int = 1) -> None:
        self.pool = BlockPool(blocks, 4)
        self.runner = PagedRunner(blocks, 4)
        self.runner.slots = {0: "a", 1: "b"}
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=max(budget, sequences),
            max_sequences=sequences,
            max_model_len=60,
            eos_token_ids=(EOS,),
            speculative_tokens=guesses,
            speculative_ngram=ngram,
        )
        self.sequences: list[Sequence] = []
        self.told: list[tuple[list[int], list[TokenLogprobs]]] = []
        self.steps = 0

    @property
    def is_busy(self) -> bool:
        return bool(self.scheduler.num_running or self.scheduler.num_waiting)

    def add(self, request: Generate, adapter: str | None = None, leader: Sequence | None = None) -> Sequence:
        key = len(self.sequences)
        sequence = Sequence(key=key, request=request, arrival_s=0.0, seed=key % 3, leader=leader)
        sequence.adapter_digest, sequence.slot = adapter, None if adapter is None else "ab".index(adapter)
        self.sequences.append(sequence)
        self.told.append(([], []))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.chunks or not self.scheduler.num_running
        for made in self.scheduler.apply(plan, self.runner.run(plan)):
            tokens, scores = self.told[made.sequence.key]
            tokens += made.token_ids
            scores += made.logprobs or []
        self.pool.check([sequence.block_table for sequence in self.sequences])
        self.steps += 1
        assert self.steps < 3000, "no end"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=9),
    st.integers(15, 40),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 2),
    st.randoms(use_true_random=False),
)
def test_an_answer_never_depends_on_the_company_or_on_guesses(
    given_requests, blocks, budget, sequences, guesses, ngram, random
):
    trial = Trial(blocks, budget, sequences, guesses, ngram)
    pending = list(given_requests)
    while pending or trial.is_busy:
        if pending:
            template, tail, sampling, adapter, priority, salt, follows = pending.pop()
            leader = trial.sequences[-1] if follows and trial.sequences else None
            prompt = template + tail
            if leader is not None:
                prompt, adapter, salt = (
                    leader.request.prompt,
                    leader.adapter_digest,
                    leader.request.cache_salt,
                )
            trial.add(Generate("r", prompt, sampling, priority=priority, cache_salt=salt), adapter, leader)
        if random.random() < 0.05:
            victim = random.choice(trial.sequences)
            if victim.state is not SequenceState.FINISHED:
                trial.scheduler.abort(victim)
        trial.step()
    assert trial.pool.num_available == blocks
    for sequence, (tokens, scores) in zip(trial.sequences, trial.told, strict=True):
        expected = alone(sequence.request, sequence.seed, sequence.adapter_digest, trial.scheduler.max_len)
        if sequence.finish_reason is None:  # aborted
            assert tokens == expected[0][: len(tokens)]
            continue
        assert (tokens, scores, sequence.finish_reason) == expected
        if sequence.request.sampling.prompt_logprobs is not None:
            assert len(sequence.prompt_logprobs) == sequence.num_prompt_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_right_guesses_save_steps(temperature):
    steps = []
    for guesses in (0, 4):
        trial = Trial(100, 64, 4, guesses)
        sampling = SamplingParams(40, temperature=temperature, ignore_eos=True)
        for template in TEMPLATES:
            trial.add(Generate("r", template, sampling))
        while trial.is_busy:
            trial.step()
        steps.append(trial.steps)
        found = [tokens for tokens, _ in trial.told]
        assert found == [alone(s.request, s.seed, None, 60)[0] for s in trial.sequences]
    assert steps[1] < steps[0]


def test_only_right_guesses_enter_the_prefix_cache():
    trial = Trial(100, 64, 4, 4)
    first = trial.add(Generate("r", TEMPLATES[1], SamplingParams(30, temperature=0.5, ignore_eos=True)))
    while trial.is_busy:
        trial.step()
    assert trial.scheduler.num_proposed > trial.scheduler.num_accepted
    longer = trial.add(Generate("r", first.token_ids, SamplingParams(10, temperature=0.0, ignore_eos=True)))
    while trial.is_busy:
        trial.step()
    assert longer.num_cached >= len(TEMPLATES[1]) + 20
    assert trial.told[1] == alone(longer.request, 0, None, 60)[:2]
