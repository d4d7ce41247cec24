"""A weighted sum of adapters is PEFT's `cat`, token for token; what cannot be summed is refused."""

import itertools
import os
import queue
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from prometheus_client import generate_latest

from engine.checkpoint import open_checkpoint
from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.loop import EngineLoop, ModelLimits
from engine.protocol import AdapterPart, AdapterRef, Generate, RejectCode, Rejected, SamplingParams
from tests.engine.driving import Driver, local_sources, read_local
from tests.engine.test_oracle import prompts
from tests.engine.tiny import write_tiny_adapter, write_tiny_model

WEIGHTS = {"qv": 0.7, "mlp": -0.4, "ends": 1.5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("merge")
    model = write_tiny_model(folder / "model", "qwen2")

    def write(name: str, rank: int, targets, seed: int, **options) -> Path:
        return write_tiny_adapter(folder / name, model, rank, targets, seed, **options)

    return model, {
        "qv": write("qv", 8, ["q_proj", "v_proj"], 1),
        "mlp": write("mlp", 3, ["up_proj", "down_proj", "v_proj"], 2, rslora=True),
        "ends": write("ends", 5, ["v_proj", "lm_head", "embed_tokens"], 3),
        "dora": write("dora", 2, ["q_proj"], 4, use_dora=True),
        "large": write("large", 600, ["q_proj"], 5),
    }


def merged(adapters: dict[str, Path], weights: dict[str, float]) -> AdapterRef:
    parts = (AdapterPart(AdapterRef(f"tiny/{name}", str(adapters[name])), w) for name, w in weights.items())
    return AdapterRef("tiny/merged", "", parts=tuple(parts))


@torch.inference_mode()
def expected(model: Path, adapters: dict[str, Path], prompt: list[int], count: int) -> list[int]:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    names = list(WEIGHTS)
    oracle = peft.PeftModel.from_pretrained(base, str(adapters[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        oracle.load_adapter(str(adapters[name]), adapter_name=name)
    oracle.base_model.add_weighted_adapter(names, list(WEIGHTS.values()), "sum", combination_type="cat")  # type: ignore[operator]
    oracle.set_adapter("sum")
    ids, past, tokens = torch.tensor([prompt]), None, []
    for _ in range(count):
        out = oracle.eval()(input_ids=ids, past_key_values=past, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
        ids, past = torch.tensor([tokens[-1:]]), out.past_key_values
    return tokens


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_weighted_sum_answers_as_peft_s_beside_its_parts(tiny):
    model, adapters = tiny
    driver = Driver(model, {**adapters, "sum": merged(adapters, WEIGHTS)})
    (prompt,) = prompts(7, 21)
    asked = {name: driver.add(prompt, name, max_tokens=16) for name in (None, *WEIGHTS, "sum")}
    driver.run()
    answers = {name: driver.generated(sequence) for name, sequence in asked.items()}
    assert answers["sum"] == expected(model, adapters, prompt, 16)
    assert len(set(map(tuple, answers.values()))) == len(answers)


def test_the_identity_of_a_sum_is_that_of_its_parts_and_weights(tiny):
    model, adapters = tiny
    spec = open_checkpoint(model).spec
    sums = [{"qv": 0.7, "mlp": 0.3}, {"qv": 0.7, "mlp": 0.30001}, {"qv": 0.7, "ends": 0.3}, {"qv": 0.7}]
    digests = {read_local(merged(adapters, weights), spec).digest for weights in sums}
    assert len(digests) == len(sums)
    alone = read_local(AdapterRef("tiny/dora", str(adapters["dora"])), spec)
    assert read_local(merged(adapters, {"dora": 1.0}), spec).digest == alone.digest


def test_the_version_of_a_sum_changes_with_any_part(tiny):
    model, adapters = tiny
    sources = local_sources(open_checkpoint(model).spec)
    ref = merged(adapters, WEIGHTS)
    before = sources.version_of(ref)
    assert sources.version_of(ref) == before
    os.utime(adapters["mlp"] / "adapter_config.json", ns=(1, 1))
    assert sources.version_of(ref) != before
    with pytest.raises(AdapterNotFoundError):
        sources.version_of(AdapterRef("x", "", parts=(AdapterPart(AdapterRef("tiny/no", "/no/such"), 1.0),)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"qv": 1.0, "dora": 1.0}, "tiny/dora has DoRA, .* of which there is no weighted sum"),
        ({"dora": 0.5}, "tiny/dora has DoRA"),
        ({"large": 1.0, "qv": 1.0}, None),
    ],
)
def test_what_has_no_sum_is_refused_by_name(tiny, weights, message):
    model, adapters = tiny
    spec = open_checkpoint(model).spec
    if message is None:
        ref = AdapterRef(
            "tiny/sum", "", parts=merged(adapters, weights).parts + merged(adapters, weights).parts
        )
        message = "ranks of the merged adapters add up to 1216; the largest is 1024"
    else:
        ref = merged(adapters, weights)
    with pytest.raises(AdapterError, match=message):
        read_local(ref, spec)


def test_a_part_that_cannot_be_read_is_named(tiny, tmp_path):
    model, adapters = tiny
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"tiny/bad: adapter_config\.json: peft_type is None"):
        ref = merged({**adapters, "bad": tmp_path}, {"qv": 1.0, "bad": 1.0})
        read_local(ref, open_checkpoint(model).spec)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sum_is_loaded_through_the_loop_like_any_adapter(tiny, tmp_path):
    model, adapters = tiny
    driver = Driver(model)
    spec = driver.checkpoint.spec
    messages: queue.Queue = queue.Queue()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")

    def deliver(outbox) -> None:
        for message in itertools.chain(*outbox.values()):
            messages.put(message)

    engine = EngineLoop(
        driver.runner,
        driver.config,
        ModelLimits(spec.vocab_size, 512, spec.eos_token_ids),
        deliver,
        read_adapter=partial(read_local, spec=spec),
        version_of=local_sources(spec).version_of,
        device_bytes=lambda adapter: adapter.device_bytes(4),
    )
    engine.start()
    (prompt,) = prompts(7, 21)

    def answer(weights: dict[str, float], **others: Path) -> tuple[list[int], Rejected | None]:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        engine.submit(1, Generate("r", prompt, params, merged(adapters | others, weights)))
        tokens = []
        while len(tokens) < 8:
            message = messages.get(timeout=10)
            if isinstance(message, Rejected):
                return tokens, message
            tokens += [token for output in message.outputs for token in output.token_ids]
        return tokens, None

    try:
        assert answer(WEIGHTS) == (expected(model, adapters, prompt, 8), None)
        _, infinite = answer({"qv": float("nan"), "mlp": 1.0})
        assert infinite is not None and "must be finite" in infinite.message
        _, absent = answer({"qv": 1.0, "gone": 1.0}, gone=Path("/no/such"))
        assert absent is not None and absent.code is RejectCode.ADAPTER_NOT_FOUND
        _, broken = answer({"qv": 1.0, "bad": 1.0}, bad=tmp_path)
        assert broken is not None and broken.code is RejectCode.ADAPTER_INVALID
        assert "tiny/bad: adapter_config.json" in broken.message and str(tmp_path) not in broken.message
    finally:
        engine.stop()
    assert 'adapter="(merged)"' in generate_latest(engine.metrics.registry).decode()
