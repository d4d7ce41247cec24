"""The quality table: the first is its own yardstick, worse weights cost perplexity, bad input is told."""

import json

import pytest
import torch

from engine.checkpoint import open_checkpoint
from scripts.quant_quality import Subject, main, measure, read_text
from tests.engine.tiny import VOCABULARY, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")


def test_figures_against_the_definition(model):
    subjects = [Subject(open_checkpoint(model), torch.float32, form, 32) for form in ("none", "int8", "nf4")]
    tokens = torch.randint(3, VOCABULARY, (75,), generator=torch.Generator().manual_seed(1)).tolist()
    none, int8, nf4 = measure(subjects, tokens, 32)
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(
                subjects[0].logits(tokens[start : start + 32])[:-1],
                torch.tensor(tokens[start + 1 : start + 32]),
                reduction="none",
            )
            for start in (0, 32, 64)
        ]
    assert none.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert (none.agreement, none.divergence) == (1.0, 0.0)
    assert 0 < int8.divergence < nf4.divergence and 1 > int8.agreement > nf4.agreement > 0
    assert none.weight_mib > int8.weight_mib


def test_a_step_at_a_position_gives_the_logits_of_the_whole_text(model):
    subject = Subject(open_checkpoint(model), torch.float32, "int8", 32)
    tokens = list(range(5, 25))
    with torch.inference_mode():
        whole = subject.logits(tokens)
        subject.logits(tokens[:12])
        assert torch.allclose(subject.logits(tokens[12:13], 12)[0], whole[12], atol=1e-4)


def test_the_table_of_a_file(model, tmp_path, capsys):
    text = tmp_path / "rows.jsonl"
    text.write_text(
        "".join(
            json.dumps({"a": f"row {i}", "b": ["to be", {"c": "or not"}], "n": i}) + "\n" for i in range(9)
        )
    )
    assert read_text(text).startswith("row 0\nto be\nor not\n\nrow 1")
    assert main(["--text", str(text), "--model", str(model), "--window", "16", "--tokens", "60"]) == 0
    printed = capsys.readouterr().out
    assert all(form in printed for form in ("none", "int8", "nf4", "60 tokens"))


def test_a_missing_file_is_told(model, tmp_path, capsys):
    assert main(["--text", str(tmp_path / "none.txt"), "--model", str(model)]) == 1
    assert "none.txt" in capsys.readouterr().err
