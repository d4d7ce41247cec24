"""Sampling: each parameter does what OpenAI and vLLM say it does, and no row depends on another."""

import math
from collections import Counter

import pytest
import torch

from engine.protocol import Generate, SamplingParams
from engine.sampler import sample, token_logprobs, uniform_draw
from engine.sequence import Sequence

VOCABULARY = 50


def sequence(prompt=(1, 2, 3), generated=(), seed=0, **sampling) -> Sequence:
    params = SamplingParams(**{"max_tokens": 10, **sampling})
    made = Sequence(key=0, request=Generate("r", list(prompt), params), arrival_s=0.0, seed=seed)
    made.token_ids.extend(generated)
    return made


def draws(logits: torch.Tensor, count: int = 400, **sampling) -> Counter[int]:
    rows = [sequence(seed=seed, **sampling) for seed in range(count)]
    return Counter(sample(logits.repeat(count, 1), rows, (0,)))


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.randn(3, VOCABULARY)
    rows = [sequence(temperature=0.0) for _ in range(3)]
    assert sample(logits.clone(), rows, (0,)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    logits = torch.randn(1, VOCABULARY)
    assert sample(logits.clone(), [sequence(temperature=temperature)], (0,)) == [int(logits.argmax())]


def test_min_tokens_of_a_model_without_end_tokens():
    assert sample(torch.eye(3)[1:2].clone(), [sequence(temperature=0.0, min_tokens=2)], ()) == [1]


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = draws(probabilities.log(), 2000)
    for token, probability in enumerate(probabilities.tolist()):
        spread = 4 * math.sqrt(probability * (1 - probability) / 2000)
        assert abs(counts[token] / 2000 - probability) < spread


def test_higher_temperature_is_flatter():
    logits = torch.tensor([3.0, 1.0, 0.0])
    assert (
        draws(logits, temperature=0.3)[0]
        > draws(logits, temperature=1.0)[0]
        > draws(logits, temperature=2.0)[0]
    )


def test_top_k_and_top_p_and_min_p_cut_the_tail():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
    assert set(draws(logits, top_k=2)) == {0, 1}
    assert set(draws(logits, top_p=0.7)) == {0, 1}
    assert set(draws(logits, top_p=0.76)) == {0, 1, 2}
    assert set(draws(logits, min_p=0.2)) == {0, 1, 2}
    assert set(draws(logits, top_p=1e-9)) == {0}
    assert set(draws(logits, top_k=3, top_p=0.5)) == {0}


def test_top_p_of_a_flat_row_needs_more_than_the_first_candidates():
    logits = torch.zeros(5000)
    assert len(set(draws(logits, 1500, top_p=0.9))) > 1100


def test_a_seed_fixes_the_token_whatever_else_is_in_the_batch():
    logits = torch.randn(6, VOCABULARY)
    alone = sample(logits[2:3].clone(), [sequence(seed=7, temperature=1.5)], (0,))
    rows = [sequence(seed=index, temperature=0.7, top_p=0.8, frequency_penalty=1.0) for index in range(6)]
    rows[2] = sequence(seed=7, temperature=1.5)
    assert sample(logits.clone(), rows, (0,))[2] == alone[0]


def test_uniform_draws_differ_by_seed_and_position_and_fill_the_interval():
    values = [uniform_draw(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(values)) == len(values)
    assert 0 <= min(values) < 0.01 and 0.99 < max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.03


def test_penalties():
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0])
    row = logits.clone()[None]
    sample(row, [sequence((1, 3), (2, 2), temperature=0.0, repetition_penalty=2.0)], (0,))
    assert row[0].tolist() == [1.0, 0.5, 0.5, -2.0, 0.0]
    row = logits.clone()[None]
    sample(
        row, [sequence((1, 3), (2, 2), temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25)], (0,)
    )
    assert row[0].tolist() == [1.0, 1.0, -0.25, -1.0, 0.0]


def test_logit_bias_can_force_and_ban_a_token():
    logits = torch.randn(1, VOCABULARY)
    best = int(logits.argmax())
    assert sample(logits.clone(), [sequence(temperature=0.0, logit_bias={7: 100.0})], (0,)) == [7]
    assert sample(logits.clone(), [sequence(temperature=0.0, logit_bias={best: -100.0})], (0,)) != [best]


def test_min_tokens_keeps_the_end_away():
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0]])
    assert sample(logits.clone(), [sequence(temperature=0.0, min_tokens=1, stop_token_ids=(2,))], (0,)) == [3]
    assert sample(logits.clone(), [sequence(generated=(3,), temperature=0.0, min_tokens=1)], (0,)) == [0]


@pytest.mark.parametrize("top", [0, 3, 200])
def test_logprobs_are_those_of_the_model(top):
    logits = torch.randn(VOCABULARY)
    found = token_logprobs(logits, 4, top)
    expected = torch.log_softmax(logits, -1)
    assert found.logprob == pytest.approx(float(expected[4]), abs=1e-6)
    assert len(found.top) == min(top, VOCABULARY)
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
    assert all(value == pytest.approx(float(expected[token]), abs=1e-6) for token, value in found.top)
