"""A runner without a model, for driving the gateway, the wire and the harness. It computes nothing real."""

import time
from typing import Any

import numpy as np

from engine.protocol import TokenLogprobs
from engine.step import Chunk, ChunkResult, StepPlan, StepResult


class FakeRunner:
    """Deterministic next tokens from (last token, position, slot, seed).

    Args:
        step_s: How long a step takes, plus `token_s` for each token in it.
        alphabet: Token ids to answer with, e.g. those of printable words.
    """

    def __init__(
        self,
        num_blocks: int = 1024,
        block_size: int = 16,
        *,
        alphabet: range | list[int] = range(100, 200),
        step_s: float = 0.0,
        token_s: float = 0.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.slots: dict[int, Any] = {}
        self._alphabet = alphabet
        self._step_s = step_s
        self._token_s = token_s

    def enter_loop_thread(self) -> None: ...

    def enter_loader_thread(self) -> None: ...

    def run(self, plan: StepPlan) -> StepResult:
        pause_s = self._step_s + self._token_s * plan.num_tokens
        if pause_s:
            time.sleep(pause_s)
        return StepResult([self._result(chunk) for chunk in plan.chunks])

    def _result(self, chunk: Chunk) -> ChunkResult:
        sampling = chunk.sequence.request.sampling
        if chunk.sequence.request.pooling is not None:
            return ChunkResult([], pooled=np.array([sum(chunk.token_ids), chunk.num_tokens], np.float32))
        tokens = self._sample(chunk) if chunk.samples else []
        logprobs = None
        if tokens and sampling.logprobs is not None:
            logprobs = [
                TokenLogprobs(-0.5, [(token + index, -0.5 - index) for index in range(sampling.logprobs)])
                for token in tokens
            ]
        prompt = None
        if sampling.prompt_logprobs is not None and chunk.start < chunk.sequence.num_prompt_tokens:
            last = min(chunk.start + chunk.num_tokens, chunk.sequence.num_prompt_tokens - 1)
            prompt = [None] if chunk.start == 0 else []
            prompt += [TokenLogprobs(-1.0, []) for _ in range(chunk.start, last)]
        return ChunkResult(tokens, logprobs, prompt)

    def _sample(self, chunk: Chunk) -> list[int]:
        known = list(chunk.sequence.token_ids)
        for guess in (*chunk.draft, None):
            known.append(self._next(chunk, known))
            if known[-1] != guess:
                break
        return known[len(chunk.sequence.token_ids) :]

    def _next(self, chunk: Chunk, token_ids: list[int]) -> int:
        sequence = chunk.sequence
        slot = -1 if sequence.slot is None else sequence.slot
        mixed = token_ids[-1] * 31 + len(token_ids) * 7 + slot * 13
        if sequence.request.sampling.temperature:
            mixed += sequence.seed
        return self._alphabet[mixed % len(self._alphabet)]

    def prepare_adapter(self, adapter: Any) -> Any:
        return adapter

    def install_adapter(self, slot: int, prepared: Any) -> None:
        if slot in self.slots:
            raise ValueError(f"slot {slot} is taken")
        self.slots[slot] = prepared

    def remove_adapter(self, slot: int) -> None:
        del self.slots[slot]
