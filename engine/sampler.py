"""Logits to tokens: every row by its own request's parameters, no row depending on another.

Shape suffixes: S rows that sample, V vocabulary.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.protocol import SamplingParams, TokenLogprobs
from engine.sequence import Sequence

NUCLEUS = 1024
"""Candidates looked at first for top-p: sorting the whole vocabulary is needed only for very flat rows."""


GREEDY_BELOW = 1e-5
"""A lower temperature is greedy, as in vLLM: dividing by it would overflow."""


def sample(logits_SV: Tensor, sequences: list[Sequence], eos_token_ids: Iterable[int]) -> list[int]:
    """One token per row. `logits_SV` (float32) is changed in place where a request asks for it.

    Order, as in vLLM: minimum length, bias, penalties, temperature, min-p, top-k, top-p.
    """
    for logits_V, sequence in zip(logits_SV, sequences, strict=True):
        adjust(logits_V, sequence, eos_token_ids)
    tokens = logits_SV.argmax(-1).tolist()
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.temperature >= GREEDY_BELOW:
            uniform = uniform_draw(sequence.seed, len(sequence.token_ids))
            tokens[row] = draw(logits_SV[row], sequence.request.sampling, uniform)
    return tokens


def check_draft(
    logits_RV: Tensor, sequence: Sequence, draft: tuple[int, ...], eos_token_ids: Iterable[int]
) -> list[int]:
    """The sequence's next tokens: one, and one more for each guess in a row that was what is sampled anyway.

    Row r gives the token after the r-th guess. The draw depends on seed and position only, so the tokens are those of
    a decode without guesses, at any temperature.
    """
    ahead = copy.copy(sequence)
    ahead.token_ids = list(sequence.token_ids)
    for logits_V, guess in zip(logits_RV, (*draft, None), strict=True):
        (token,) = sample(logits_V[None], [ahead], eos_token_ids)
        ahead.token_ids.append(token)
        if token != guess:
            break
    return ahead.token_ids[len(sequence.token_ids) :]


def adjust(logits_V: Tensor, sequence: Sequence, eos_token_ids: Iterable[int]) -> None:
    """Minimum length, logit bias and penalties, in place."""
    sampling = sequence.request.sampling
    ends = [*eos_token_ids, *sampling.stop_token_ids]
    if ends and sequence.constraint is None and sequence.num_generated < sampling.min_tokens:
        logits_V[ends] = -torch.inf
    if sampling.logit_bias:
        logits_V[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.token_ids).unique()
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.frequency_penalty or sampling.presence_penalty) and sequence.num_generated:
        generated, counts = torch.tensor(sequence.token_ids[sequence.num_prompt_tokens :]).unique(
            return_counts=True
        )
        logits_V[generated] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def draw(logits_V: Tensor, sampling: SamplingParams, uniform: float) -> int:
    """Sample by inverting the cumulative distribution at `uniform`, after temperature, min-p, top-k and top-p."""
    probabilities_V = torch.softmax(logits_V / sampling.temperature, -1)
    if sampling.min_p > 0:
        probabilities_V = torch.where(
            probabilities_V < sampling.min_p * probabilities_V.max(), 0, probabilities_V
        )
    if sampling.top_k <= 0 and sampling.top_p >= 1:
        return _invert(probabilities_V, uniform)
    size = len(probabilities_V)
    kept = min(sampling.top_k, size) if sampling.top_k > 0 else min(NUCLEUS, size)
    values, ids = probabilities_V.topk(kept)
    if sampling.top_p < 1:
        total = values.sum() if sampling.top_k > 0 else probabilities_V.sum()
        if sampling.top_k <= 0 and values.sum() < sampling.top_p * total and kept < size:
            values, ids = probabilities_V.sort(descending=True)
        before = values.cumsum(-1) - values
        values = torch.where(before < sampling.top_p * total, values, 0)
    return int(ids[_invert(values, uniform)])


def _invert(weights: Tensor, uniform: float) -> int:
    cumulative = weights.double().cumsum(-1)
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return min(index, int(weights.nonzero()[-1]))


def uniform_draw(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the request's seed and the token's position only (SplitMix64 finaliser)."""
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & mask
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def token_logprobs(logits_V: Tensor, token_id: int, top: int) -> TokenLogprobs:
    """Logprob of a token and of the `top` likeliest, under the model's own distribution."""
    logprobs_V = torch.log_softmax(logits_V, -1)
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    return TokenLogprobs(float(logprobs_V[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True)))
