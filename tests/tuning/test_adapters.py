"""The committed adapters are what their cards say. Reads files only."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tuning.card import load_facts, render
from tuning.evaluate import SCORES_FILE, read_scores
from tuning.tasks import TASKS

ADAPTERS = Path(__file__).parents[2] / "tuning" / "adapters"
COMMITTED = sorted(path.parent for path in ADAPTERS.glob("*/adapter_config.json"))


@pytest.mark.parametrize("adapter", COMMITTED, ids=lambda path: path.name)
def test_adapter_is_the_papers_recipe_in_bfloat16(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        # Two matrices for each of two projections in each of 30 layers.
        assert len(names) == 2 * 2 * 30
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert all(tensors.get_tensor(name).abs().max() > 0 for name in names)


@pytest.mark.parametrize("adapter", COMMITTED, ids=lambda path: path.name)
def test_card_is_up_to_date_with_task_training_and_scores(adapter: Path) -> None:
    facts = load_facts(adapter)
    assert facts.task == adapter.name
    scores = read_scores(ADAPTERS / SCORES_FILE).get(adapter.name)
    assert (adapter / "README.md").read_text(encoding="utf-8") == render(TASKS[adapter.name], facts, scores)
