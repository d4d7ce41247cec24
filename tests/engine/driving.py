"""Runs requests through scheduler and runner on the test's own thread, step by step."""

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.adapter import read_adapter
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import EngineConfig
from engine.disk_cache import DiskCache
from engine.host_adapter import HostAdapter
from engine.kv_blocks import BlockPool
from engine.peft import largest_file
from engine.protocol import AdapterRef, Generate, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Progress, Scheduler
from engine.sequence import Sequence
from engine.sources import LOCAL, Limits, Sources
from engine.spec import ModelSpec
from engine.step import StepPlan


def local_sources(spec: ModelSpec) -> Sources:
    """Local directories, nothing on disk."""
    return Sources((LOCAL,), DiskCache(Path("nowhere"), 0), Limits(largest_file(spec)), 60.0)


def read_local(ref: AdapterRef, spec: ModelSpec) -> HostAdapter:
    return read_adapter(ref, spec, local_sources(spec))


class Driver:
    """One engine without threads: add requests, step, look at everything."""

    def __init__(
        self, model: str | Path, adapters: Mapping[str, Path | AdapterRef] | None = None, **config
    ) -> None:
        values = {
            "model": str(model),
            "name": "tiny",
            "dtype": "float32",
            "kv_cache_mib": 8,
            "threads": 1,
            **config,
        }
        pool_blocks = values.pop("pool_blocks", None)
        self.config = EngineConfig(**values)
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.runner = ModelRunner(self.checkpoint, self.config)
        self.slots: dict[str, tuple[int, str]] = {}
        for slot, (name, path) in enumerate((adapters or {}).items()):
            ref = path if isinstance(path, AdapterRef) else AdapterRef(name, str(path))
            adapter = read_local(ref, self.checkpoint.spec)
            self.runner.install_adapter(slot, self.runner.prepare_adapter(adapter))
            self.slots[name] = slot, adapter.digest
        self.pool = BlockPool(pool_blocks or self.runner.num_blocks, self.runner.block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=self.config.max_batch_tokens,
            max_sequences=self.config.max_sequences,
            max_model_len=self.config.max_model_len,
            eos_token_ids=self.checkpoint.spec.eos_token_ids,
            speculative_tokens=self.config.speculative_tokens,
            speculative_ngram=self.config.speculative_ngram,
        )
        self.sequences: list[Sequence] = []

    def add(self, prompt: list[int], adapter: str | None = None, **sampling) -> Sequence:
        params = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **sampling})
        key = len(self.sequences)
        sequence = Sequence(
            key=key, request=Generate(str(key), prompt, params), arrival_s=0.0, seed=params.seed or 0
        )
        if adapter is not None:
            sequence.slot, sequence.adapter_digest = self.slots[adapter]
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Progress]:
        plan = self.scheduler.schedule()
        progress = self.scheduler.apply(plan, self.runner.run(plan)) if plan.chunks else []
        self.pool.check([sequence.block_table for sequence in self.sequences])
        return progress

    def run(self, watch: Callable[[StepPlan], None] | None = None) -> list[Progress]:
        """Until nothing is left."""
        progress: list[Progress] = []
        while self.scheduler.num_running or self.scheduler.num_waiting:
            plan = self.scheduler.schedule()
            if watch is not None:
                watch(plan)
            progress += self.scheduler.apply(plan, self.runner.run(plan))
            self.pool.check([sequence.block_table for sequence in self.sequences])
        return progress

    def generated(self, sequence: Sequence) -> list[int]:
        return sequence.token_ids[sequence.num_prompt_tokens :]
