"""A runner whose next token depends on everything it finds in the pages: a toy model with an honest KV cache.

Every page entry says which adapter wrote which token for which position, and a row's logits are a function of all the
entries it attends to. So a stale page, a block shared by mistake or a rejected guess that is still seen changes tokens.
"""

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.fake_runner import FakeRunner
from engine.host_adapter import HostAdapter
from engine.protocol import FinishReason, Generate, TokenLogprobs
from engine.sampler import check_draft, sample, token_logprobs
from engine.sequence import Sequence
from engine.step import Chunk, ChunkResult, StepPlan, StepResult

VOCABULARY = 8
EOS = 7
LOGITS = 2 * torch.randn(499, VOCABULARY, generator=torch.Generator().manual_seed(0))
LOGITS[:, EOS] -= 2

Entry = tuple[int, int, int]
"""Adapter, token, position."""


class PagedRunner(FakeRunner):
    """Samples with the real sampler from what the pages hold. `slots`: slot -> digest."""

    def __init__(self, num_blocks: int, block_size: int, step_s: float = 0.0) -> None:
        super().__init__(num_blocks, block_size, step_s=step_s)
        self._pages: dict[int, Entry] = {}

    def prepare_adapter(self, adapter: HostAdapter) -> Any:
        return adapter.digest

    def run(self, plan: StepPlan) -> StepResult:
        super().run(StepPlan([]))
        for chunk in plan.chunks:
            digest = None if chunk.sequence.slot is None else self.slots[chunk.sequence.slot]
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self._pages[self._address(chunk.sequence, position)] = entry(digest, token, position)
        return StepResult([self._compute(chunk) for chunk in plan.chunks])

    def _compute(self, chunk: Chunk) -> ChunkResult:
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        end = chunk.start + chunk.num_tokens
        prompt: list[TokenLogprobs | None] | None = None
        if sampling.prompt_logprobs is not None and chunk.start < sequence.num_prompt_tokens:
            prompt = [None] if chunk.start == 0 else []
            for position in range(chunk.start + 1, min(end, sequence.num_prompt_tokens - 1) + 1):
                logits_V = self._logits(sequence, position - 1)
                prompt.append(
                    token_logprobs(logits_V, sequence.token_ids[position], sampling.prompt_logprobs)
                )
        if not chunk.samples:
            return ChunkResult([], None, prompt)
        raw_RV = torch.stack([self._logits(sequence, row) for row in range(end - 1 - len(chunk.draft), end)])
        tokens = check_draft(raw_RV.clone(), sequence, chunk.draft, (EOS,))
        scores = None
        if sampling.logprobs is not None:
            scores = [
                token_logprobs(raw_RV[row], token, sampling.logprobs) for row, token in enumerate(tokens)
            ]
        return ChunkResult(tokens, scores, prompt)

    def _logits(self, sequence: Sequence, position: int) -> Tensor:
        return logits_of(
            self._pages.get(self._address(sequence, each), (0, 0, 0)) for each in range(position + 1)
        )

    def _address(self, sequence: Sequence, position: int) -> int:
        block = sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size


def alone(
    request: Generate, seed: int, digest: str | None, max_len: int
) -> tuple[list[int], list[TokenLogprobs], FinishReason]:
    """Tokens, their scores and the end of a request on its own: no pages, no batch, no guesses."""
    sampling = request.sampling
    sequence = Sequence(key=0, request=request, arrival_s=0.0, seed=seed)
    told: list[int] = []
    scores: list[TokenLogprobs] = []
    while True:
        raw_V = logits_of(entry(digest, token, at) for at, token in enumerate(sequence.token_ids))
        (token,) = sample(raw_V.clone()[None], [sequence], (EOS,))
        sequence.token_ids.append(token)
        ends = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if ends and sequence.num_generated > sampling.min_tokens:
            return told, scores, FinishReason.STOP
        told.append(token)
        if sampling.logprobs is not None:
            scores.append(token_logprobs(raw_V, token, sampling.logprobs))
        if len(told) == sampling.max_tokens or len(sequence.token_ids) == max_len:
            return told, scores, FinishReason.LENGTH


def entry(digest: str | None, token: int, position: int) -> Entry:
    return zlib.crc32((digest or "").encode()), token, position


def logits_of(entries: Iterable[Entry]) -> Tensor:
    # The last token matters most, so that answers repeat themselves and guesses are often right.
    seen = tuple(entries)
    return LOGITS[hash(seen) % 499] + LOGITS[seen[-1][1]]
