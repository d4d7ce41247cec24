"""Executes a `StepPlan` with the model: batch, forward pass, sampling. Never changes a sequence."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import structlog
import torch

from engine.batch import build_batch
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.device_adapter import DeviceAdapter, prepare_adapter
from engine.grammar import GrammarError
from engine.host_adapter import HostAdapter
from engine.kernels import select_kernels
from engine.kernels.reference import BLOCK
from engine.lora import LoraSlots
from engine.model import Decoder
from engine.protocol import TokenLogprobs
from engine.sampler import check_draft, sample, token_logprobs
from engine.step import Chunk, ChunkResult, StepPlan, StepResult

log = structlog.get_logger()

LOADER_NICENESS = 10
"""Loaders leave the processors to the steps: a core they took would hold up every thread at the next barrier."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ModelRunner:
    """The real runner: weights, pages and adapter slots on the CPU."""

    block_size = BLOCK

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._threads = config.threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        started = time.monotonic()
        spec, dtype = checkpoint.spec, DTYPES[config.dtype]
        kernels = select_kernels(dtype, config.kernels, config.batch_invariant)
        positions = min(config.max_model_len, spec.max_position_embeddings)
        self._eos_token_ids = spec.eos_token_ids
        self._dtype = dtype
        with torch.inference_mode():
            self._model = Decoder(checkpoint, dtype, kernels, positions, progress, config.quantization)
        block_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * BLOCK * dtype.itemsize
        self.num_blocks = max(1, config.kv_cache_mib * 2**20 // block_bytes)
        self._kv_cache = self._model.new_kv_cache(self.num_blocks)
        self._mask_maker = ThreadPoolExecutor(1, "grammar-masks")
        self._lora = LoraSlots(spec, config.adapter_slots)
        log.info(
            "model_loaded",
            seconds=round(time.monotonic() - started, 2),
            dtype=config.dtype,
            quantization=checkpoint.served_as(config.quantization),
            weight_mib=round(self._model.weight_bytes / 2**20, 1),
            kv_blocks=self.num_blocks,
            kv_tokens=self.num_blocks * BLOCK,
            threads=self._threads,
        )

    def enter_loop_thread(self) -> None:
        torch.set_num_threads(self._threads)

    def enter_loader_thread(self) -> None:
        # OpenMP counts the threads of every pool: with more of them than cores none spins at a barrier any more,
        # and every step takes half as long again.
        torch.set_num_threads(1)
        if sys.platform == "linux":  # there a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)

    def prepare_adapter(self, adapter: HostAdapter) -> DeviceAdapter:
        with torch.inference_mode():
            return prepare_adapter(adapter, self._dtype, self._model)

    def install_adapter(self, slot: int, prepared: DeviceAdapter) -> None:
        self._lora.install(slot, prepared)

    def remove_adapter(self, slot: int) -> None:
        self._lora.remove(slot)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        masks = self._start_masks(plan)
        batch = build_batch(plan, BLOCK)
        hidden_TH = self._model.forward(batch, self._kv_cache, self._lora)
        ends = batch.query_start[1:].tolist()
        sampled = self._sample(plan, hidden_TH, ends, masks)
        return StepResult(
            [
                replace(
                    sampled.get(index, ChunkResult([])),
                    prompt_logprobs=self._prompt_logprobs(chunk, hidden_TH, end),
                    pooled=_pooled(chunk, hidden_TH, end),
                )
                for index, (chunk, end) in enumerate(zip(plan.chunks, ends, strict=True))
            ]
        )

    def _start_masks(self, plan: StepPlan) -> dict[int, Future[torch.Tensor]]:
        """By place in the plan: the masks of grammars, computed beside the forward pass."""
        return {
            index: self._mask_maker.submit(
                sequence.constraint.mask, sequence.token_ids[sequence.num_prompt_tokens :]
            )
            for index, chunk in enumerate(plan.chunks)
            if (sequence := chunk.sequence).constraint is not None and chunk.samples
        }

    def _sample(
        self,
        plan: StepPlan,
        hidden_TH: torch.Tensor,
        ends: list[int],
        masks: dict[int, Future[torch.Tensor]],
    ) -> dict[int, ChunkResult]:
        """What the chunks that sample gave, by their place in the plan."""
        sampling = [
            (index, chunk)
            for index, chunk in enumerate(plan.chunks)
            if chunk.samples and chunk.sequence.request.pooling is None
        ]
        # Those without guesses come first and are sampled together.
        sampling.sort(key=lambda each: len(each[1].draft))
        plain = [chunk.sequence for _, chunk in sampling if not chunk.draft]
        rows = [row for i, chunk in sampling for row in range(ends[i] - 1 - len(chunk.draft), ends[i])]
        if not rows:
            return {}
        slots = [chunk.sequence.slot for _, chunk in sampling for _ in range(1 + len(chunk.draft))]
        logits_RV = self._model.logits(hidden_TH[rows], slots, self._lora)
        scored = any(chunk.sequence.request.sampling.logprobs is not None for _, chunk in sampling)
        raw_RV = logits_RV.clone() if scored else logits_RV
        errors: dict[int, str] = {}
        for row, (index, _) in enumerate(sampling[: len(plain)]):
            if index in masks:
                try:
                    logits_RV[row].masked_fill_(~masks[index].result(), -torch.inf)
                except GrammarError as error:
                    errors[index] = str(error)
        found = [[token] for token in sample(logits_RV[: len(plain)], plain, self._eos_token_ids)]
        row = len(plain)
        for _, chunk in sampling[len(plain) :]:
            stop = row + 1 + len(chunk.draft)
            found.append(check_draft(logits_RV[row:stop], chunk.sequence, chunk.draft, self._eos_token_ids))
            row = stop
        results: dict[int, ChunkResult] = {}
        row = 0
        for (index, chunk), tokens in zip(sampling, found, strict=True):
            top = chunk.sequence.request.sampling.logprobs
            scores = None
            if top is not None:
                scores = [token_logprobs(raw_RV[row + i], token, top) for i, token in enumerate(tokens)]
            if index in errors:
                results[index] = ChunkResult([], error=errors[index])
            else:
                results[index] = ChunkResult(tokens, scores, complete=self._completes(chunk, tokens[-1]))
            row += 1 + len(chunk.draft)
        return results

    def _completes(self, chunk: Chunk, token_id: int) -> bool:
        constraint = chunk.sequence.constraint
        return constraint is not None and token_id not in self._eos_token_ids and constraint.take(token_id)

    def _prompt_logprobs(
        self, chunk: Chunk, hidden_TH: torch.Tensor, end: int
    ) -> list[TokenLogprobs | None] | None:
        """Logprobs of the prompt tokens that this chunk's rows predict, plus None for the very first token.

        A row predicts the token after it, so a chunk yields positions start+1 .. start+num_tokens of the prompt
        (and 0 when it starts there).
        """
        sequence, top = chunk.sequence, chunk.sequence.request.sampling.prompt_logprobs
        if top is None or chunk.start >= sequence.num_prompt_tokens:
            return None
        last = min(chunk.start + chunk.num_tokens, sequence.num_prompt_tokens - 1)
        found: list[TokenLogprobs | None] = [None] if chunk.start == 0 else []
        for position in range(chunk.start + 1, last + 1):
            row = end - chunk.num_tokens + position - 1 - chunk.start
            logits_V = self._model.logits(hidden_TH[row : row + 1], [sequence.slot], self._lora)[0]
            found.append(token_logprobs(logits_V, sequence.token_ids[position], top))
        return found


def _pooled(chunk: Chunk, hidden_TH: torch.Tensor, end: int) -> Any:
    """[H] the chunk's part of the sum that is wanted: all of its rows, or the prompt's last. None when none is."""
    match chunk.sequence.request.pooling:
        case "mean":
            return hidden_TH[end - chunk.num_tokens : end].float().sum(0).cpu().numpy()
        case "last" if chunk.samples:
            return hidden_TH[end - 1].float().cpu().numpy().copy()  # the next step overwrites its row
        case _:
            return None
