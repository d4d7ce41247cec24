"""Pooled hidden states equal those of transformers: beside others, in chunks, with an adapter, after a cache hit."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from engine.loop import _embedding
from engine.protocol import Generate, SamplingParams
from engine.sequence import Sequence, SequenceState
from tests.engine.driving import Driver
from tests.engine.tiny import VOCABULARY, write_tiny_adapter, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("pooling") / "model", "llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_tiny_adapter(
        tmp_path_factory.mktemp("pooling") / "a", model, 4, ["q_proj", "down_proj"], seed=1
    )


def ask(driver: Driver, prompt: list[int], pooling: str, adapter: str | None = None) -> Sequence:
    key = len(driver.sequences)
    request = Generate(str(key), prompt, SamplingParams(max_tokens=1), pooling=pooling)  # pyright: ignore
    sequence = Sequence(key=key, request=request, arrival_s=0.0)
    if adapter is not None:
        sequence.slot, sequence.adapter_digest = driver.slots[adapter]
    driver.sequences.append(sequence)
    driver.scheduler.add(sequence)
    return sequence


@torch.inference_mode()
def expected(model: Path, prompt: list[int], pooling: str, adapter: Path | None = None) -> np.ndarray:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        oracle = peft.PeftModel.from_pretrained(oracle, str(adapter)).eval()
    hidden_TH = oracle(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    pooled_H = hidden_TH.mean(0) if pooling == "mean" else hidden_TH[-1]
    return (pooled_H / pooled_H.norm()).numpy()


def assert_equal(sequence: Sequence, oracle: np.ndarray) -> None:
    embedding = _embedding(sequence)
    assert embedding is not None
    np.testing.assert_allclose(np.frombuffer(embedding, "<f4"), oracle, atol=2e-5)


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    "options", [{}, {"max_batch_tokens": 7, "max_sequences": 4}, {"speculative_tokens": 3}]
)
def test_a_mixed_batch_gives_each_its_own(model: Path, adapter: Path, pooling: str, options: dict) -> None:
    driver = Driver(model, {"a": adapter}, **options)
    other = driver.add(prompt_of(20), max_tokens=5)
    plain = [ask(driver, prompt_of(length), pooling) for length in (1, 8, 40)]
    adapted = ask(driver, prompt_of(33), pooling, "a")
    progress = driver.run()
    for sequence in plain:
        assert_equal(sequence, expected(model, sequence.request.prompt, pooling))
    assert_equal(adapted, expected(model, adapted.request.prompt, pooling, adapter))
    assert len(driver.generated(other)) == 5
    assert [made.token_ids for made in progress if made.sequence.request.pooling] == [[]] * 4
    assert all(sequence.state is SequenceState.FINISHED for sequence in driver.sequences)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_cached_prefix_changes_nothing(model: Path, pooling: str) -> None:
    driver = Driver(model)
    prompt = prompt_of(50)
    driver.add(prompt, max_tokens=2)
    driver.run()
    sequence = ask(driver, prompt, pooling)
    driver.run()
    assert_equal(sequence, expected(model, prompt, pooling))
    assert sequence.num_cached == (0 if pooling == "mean" else 48)


def test_preemption_begins_the_sum_anew(model: Path) -> None:
    driver = Driver(model, pool_blocks=10, max_batch_tokens=16, max_sequences=4)
    others = [driver.add(prompt_of(length), max_tokens=30) for length in (30, 33, 17)]
    sequence = ask(driver, prompt_of(60), "mean")
    driver.run()
    assert_equal(sequence, expected(model, sequence.request.prompt, "mean"))
    assert all(len(driver.generated(other)) == 30 for other in others)
