"""Fine-tuning on a tiny random Llama: no real weights, no network."""

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from tuning.finetune import (
    Example,
    Recipe,
    batches,
    learning_rate_factor,
    save_adapter,
    shared_prefix,
    target_loss,
    train,
)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()


# Said by transformers of a call inside peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PREFIX = [1, 5, 6, 7]
EXAMPLES = [
    Example([*PREFIX, 10, 11], [20, 2]),
    Example([*PREFIX, 12, 13, 14], [21, 2]),
    Example([*PREFIX, 15], [22, 23, 2]),
    Example([*PREFIX, 16, 17], [24, 2]),
]


def adapter_gradients(prefix_length: int) -> tuple[float, list[torch.Tensor]]:
    model, _ = train(tiny_llama(), EXAMPLES, Recipe(steps=2, batch=2, learning_rate=0.05), lambda line: None)
    model.zero_grad()
    loss = target_loss(model, EXAMPLES, prefix_length)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def test_running_the_shared_start_once_changes_neither_loss_nor_gradients() -> None:
    alone_loss, alone = adapter_gradients(0)
    shared_loss, shared = adapter_gradients(len(PREFIX))
    assert shared_loss == pytest.approx(alone_loss, rel=1e-5)
    assert len(shared) == len(alone) > 0
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_loss_counts_target_tokens_only() -> None:
    model, _ = train(tiny_llama(), EXAMPLES, Recipe(steps=1, batch=2), lambda line: None)
    example = EXAMPLES[2]
    ids = torch.tensor([example.prompt_ids + example.target_ids])
    with torch.no_grad():
        log_probabilities = model(ids).logits[0].float().log_softmax(-1)
        start = len(example.prompt_ids)
        picked = [log_probabilities[start - 1 + i, token] for i, token in enumerate(example.target_ids)]
        expected = -torch.stack(picked).mean()
        torch.testing.assert_close(target_loss(model, [example], 0), expected, rtol=1e-4, atol=1e-6)


def test_a_few_steps_lower_the_loss_and_the_saved_adapter_reloads_with_peft(tmp_path: Path) -> None:
    model, losses = train(
        tiny_llama(), EXAMPLES, Recipe(steps=12, batch=4, learning_rate=0.05), lambda line: None
    )
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    ids = torch.tensor([EXAMPLES[0].prompt_ids])
    with torch.no_grad():
        # Saved as bfloat16, so compared at its precision; the untrained base must differ by far more.
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0.05, atol=0.02)
        assert (tiny_llama()(ids).logits - model(ids).logits).abs().max() > 0.05


def test_shared_prefix_leaves_every_prompt_a_token_of_its_own() -> None:
    assert shared_prefix(EXAMPLES) == len(PREFIX)
    assert shared_prefix([Example([1, 2, 3], [9]), Example([1, 2, 3], [8])]) == 2


def test_each_epoch_uses_every_example_once() -> None:
    supply = batches(EXAMPLES, 2, random.Random(0))
    for _ in range(3):
        epoch = next(supply) + next(supply)
        assert sorted(map(id, epoch)) == sorted(map(id, EXAMPLES))


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 200) for step in range(201)]
    peak = factors.index(max(factors))
    assert factors[peak] == pytest.approx(1.0)
    assert factors[0] < factors[1]
    assert all(a >= b for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))
    assert factors[200] == pytest.approx(0.0)
