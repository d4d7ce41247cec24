"""In bfloat16 with LoRA, a request gives the same tokens alone and in any company, however it is computed."""

import random
from pathlib import Path

import pytest

from engine.kernels import CompileError
from engine.kernels.library import load_library
from engine.step import StepPlan
from tests.engine.driving import Driver
from tests.engine.tiny import VOCABULARY, write_tiny_adapter, write_tiny_model

ADAPTERS = ("qv", "all")
RUNS = 10
SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    try:
        load_library()
    except CompileError as error:
        pytest.skip(f"no native kernels: {error}")
    folder = tmp_path_factory.mktemp("invariance")
    model = write_tiny_model(folder / "model", "llama")
    return model, {
        "qv": write_tiny_adapter(folder / "qv", model, 8, ["q_proj", "v_proj"], seed=1),
        "all": write_tiny_adapter(folder / "all", model, 5, "all-linear", seed=2),
    }


def answer(tiny, company: random.Random | None, sampling: dict, **config) -> tuple[int, ...]:
    """What the same request is answered among random companions (None: alone), in a fresh engine."""
    watch, preemptions = config.pop("watch", None), config.pop("preemptions", [])
    driver = Driver(tiny[0], tiny[1], dtype="bfloat16", **config)
    prompt = list(range(3, 53))
    before, after = (company.randrange(5), company.randrange(1, 5)) if company else (0, 0)

    def add_companion() -> None:
        assert company is not None
        tokens = [company.randrange(3, VOCABULARY) for _ in range(company.randrange(1, 40))]
        adapter = company.choice([None, *ADAPTERS])
        driver.add(tokens, adapter, max_tokens=company.randrange(1, 40), temperature=company.choice([0, 1]))

    for _ in range(before):
        add_companion()
    for _ in range(company.randrange(3) if company else 0):
        driver.step()
    asked = driver.add(prompt, "all", max_tokens=40, **sampling)
    for _ in range(after):
        add_companion()
    driver.run(watch)
    preemptions.append(driver.scheduler.num_preemptions)
    return tuple(driver.generated(asked))


@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "seeded"])
def test_one_answer_in_ten_different_companies(tiny, sampling):
    alone = answer(tiny, None, sampling)
    assert {answer(tiny, random.Random(run), sampling) for run in range(RUNS)} == {alone}


def test_one_answer_chunked_preempted_and_from_the_prefix_cache(tiny):
    greedy = SAMPLING[0]
    alone = answer(tiny, None, greedy)
    chunks: list[int] = []

    def watch(plan: StepPlan) -> None:
        chunks.extend(chunk.num_tokens for chunk in plan.chunks)

    assert answer(tiny, random.Random(1), greedy, max_batch_tokens=9, max_sequences=9, watch=watch) == alone
    assert max(chunks) <= 9
    preemptions: list[int] = []
    squeezed = {"pool_blocks": 7, "preemptions": preemptions}
    assert {answer(tiny, random.Random(run), greedy, **squeezed) for run in range(4)} == {alone}
    assert sum(preemptions) > 0
    driver = Driver(tiny[0], tiny[1], dtype="bfloat16")
    for _ in range(2):
        asked = driver.add(list(range(3, 53)), "all", max_tokens=40, **greedy)
        driver.run()
        assert tuple(driver.generated(asked)) == alone
    assert asked.num_cached > 0


def test_equal_batches_give_bit_equal_logprobs(tiny):
    scores = []
    for _ in range(2):
        driver = Driver(tiny[0], tiny[1], dtype="bfloat16")
        for name in (None, *ADAPTERS):
            driver.add(list(range(5, 30)), name, max_tokens=4, logprobs=VOCABULARY)
        scores.append([made.logprobs for made in driver.run()])
    assert scores[0] == scores[1]
