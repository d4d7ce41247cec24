"""Every format of PEFT's LoRA that is served gives PEFT's greedy tokens in float32, all of them in one batch."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.host_adapter import AdapterError, HostAdapter
from engine.protocol import AdapterRef
from tests.engine.driving import Driver, read_local
from tests.engine.test_oracle import expected as greedy
from tests.engine.test_oracle import prompts
from tests.engine.tiny import write_tiny_adapter, write_tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj"]
ENDS = ["q_proj", "lm_head", "embed_tokens"]
FORMATS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 8, "targets": ["q_proj", "v_proj"]},
    "patterns": {
        "rank": 3,
        "targets": [*ATTENTION, "up_proj", "down_proj"],
        "rslora": True,
        "rank_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 64},
        "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"rank": 2, "targets": "all-linear", "use_dora": True},
    "dora_bias_all": {"rank": 8, "targets": [*ATTENTION, "o_proj"], "use_dora": True, "bias": "all"},
    "bias_all": {"rank": 3, "targets": ["q_proj", "down_proj"], "bias": "all"},
    "bias_lora_only": {"rank": 1, "targets": ["v_proj", "o_proj"], "bias": "lora_only"},
    "lora_bias": {"rank": 8, "targets": [*ATTENTION, "down_proj"], "lora_bias": True},
    "ends": {"rank": 4, "targets": ENDS, "rank_pattern": {"lm_head": 5}},
    "head": {"rank": 4, "targets": ["q_proj", "lm_head"], "lora_bias": True},
    "ends_dora": {"rank": 4, "targets": ENDS, "use_dora": True},
    "ends_tied": {"rank": 4, "targets": ENDS, "ensure_weight_tying": True},
    "replaced": {"rank": 4, "targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "replaced_head": {"rank": 4, "targets": ENDS[::2], "modules_to_save": ["lm_head"], "use_dora": True},
    "replaced_tied": {
        "rank": 4,
        "targets": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "rank_256": {"rank": 256, "targets": ["q_proj", "gate_proj"], "alpha": 64},
    "rank_1024": {"rank": 1024, "targets": ["o_proj"], "alpha": 64},
}
BASES = {"untied": "llama", "tied, with biases": "qwen2"}


@cache
def made(folder: Path, family: str) -> tuple[Path, dict[str, Path]]:
    """A model and an adapter of every format that makes sense for it."""
    model = write_tiny_model(folder / f"formats-{family}", family)
    chosen = FORMATS.items() if family == "qwen2" else [(n, o) for n, o in FORMATS.items() if "tied" not in n]
    return model, {
        name: write_tiny_adapter(folder / f"{family}-{name}", model, seed=seed, **options)
        for seed, (name, options) in enumerate(chosen, 1)
    }


@pytest.fixture(scope="module", params=BASES.values(), ids=list(BASES))
def base(request, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    return made(Path(tmp_path_factory.getbasetemp()), request.param)


@torch.inference_mode()
@cache
def expected(model: Path, adapter: Path | None, prompt: tuple[int, ...], count: int) -> list[int]:
    """PEFT's greedy answer."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        oracle = peft.PeftModel.from_pretrained(oracle, str(adapter)).eval()
    ids, past, tokens = torch.tensor([prompt]), None, []
    for _ in range(count):
        out = oracle(input_ids=ids, past_key_values=past, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
        ids, past = torch.tensor([tokens[-1:]]), out.past_key_values
    return tokens


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_every_format_in_one_batch(base, kernels):
    model, adapters = base
    driver = Driver(model, adapters, kernels=kernels, max_batch_tokens=100)
    (prompt,) = prompts(7, 21)
    names: list[str | None] = [None, *adapters]
    asked = {name: driver.add(prompt, name, max_tokens=12) for name in names}
    driver.run()
    answers = {name: driver.generated(sequence) for name, sequence in asked.items()}
    for name in names:
        assert answers[name] == expected(model, adapters[name] if name else None, tuple(prompt), 12), name
    assert len({tuple(answer) for answer in answers.values()}) > len(names) - 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "down"), [("phi", "fc2"), ("gemma3", "down_proj")])
def test_formats_on_families_that_are_built_otherwise(family, down, tmp_path):
    """Biases everywhere and parallel blocks; scaled embeddings and a capped head that are one matrix."""
    model = write_tiny_model(tmp_path / "model", family)
    chosen: list[dict[str, Any]] = [
        {"rank": 2, "targets": "all-linear", "use_dora": True},
        {"rank": 3, "targets": ["v_proj", down], "bias": "lora_only"},
        {"rank": 4, "targets": ENDS},
        {"rank": 4, "targets": ENDS, "use_dora": True},
        {"rank": 4, "targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ]
    adapters = {
        str(seed): write_tiny_adapter(tmp_path / str(seed), model, seed=seed, **options)
        for seed, options in enumerate(chosen, 1)
    }
    driver = Driver(model, adapters)
    (prompt,) = prompts(7, 21)
    asked = {name: driver.add(prompt, name, max_tokens=12) for name in (None, *adapters)}
    driver.run()
    answers = {name: driver.generated(sequence) for name, sequence in asked.items()}
    for name, answer in answers.items():
        assert answer == greedy(model, adapters[name] if name else None, prompt, 12), name
    assert len({tuple(answer) for answer in answers.values()}) == len(answers)


def test_every_format_in_bfloat16(base):
    """Rounding may turn a token, but the first ones come from far-apart logits."""
    model, adapters = base
    driver = Driver(model, adapters, dtype="bfloat16")
    (prompt,) = prompts(7, 21)
    asked = {name: driver.add(prompt, name, max_tokens=4) for name in adapters}
    driver.run()
    same = [
        driver.generated(sequence)[0] == expected(model, adapters[name], tuple(prompt), 12)[0]
        for name, sequence in asked.items()
    ]
    assert sum(same) >= 0.8 * len(same)


def test_the_base_beside_adapters_that_change_embedding_and_head_is_the_base(base):
    model, adapters = base
    answers = []
    for companions in ((), ("replaced", "ends_dora", "dora_bias_all")):
        driver = Driver(model, adapters, dtype="bfloat16")
        (prompt,) = prompts(7, 21)
        for name in companions:
            driver.add(prompt, name, max_tokens=8)
        asked = driver.add(prompt, max_tokens=8, logprobs=5)
        progress = driver.run()
        answers.append([made.logprobs for made in progress if made.sequence is asked])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["ends_dora", "replaced", "bias_all"])
def test_a_row_with_any_format_does_not_depend_on_its_company(base, name):
    model, adapters = base
    answers = []
    for companions in ((), (None, "dora", name, "replaced_head")):
        driver = Driver(model, adapters, dtype="bfloat16")
        (prompt,) = prompts(7, 21)
        for companion in companions:
            driver.add(prompt[:9], companion, max_tokens=8)
        asked = driver.add(prompt, name, max_tokens=8, logprobs=5)
        answers.append([made.logprobs for made in driver.run() if made.sequence is asked])
    assert answers[0] == answers[1] and len(answers[0]) == 8


def test_a_slot_is_empty_after_any_format(base):
    model, adapters = base
    driver = Driver(model, {"ends_dora": adapters["ends_dora"]})
    (prompt,) = prompts(7, 21)
    driver.runner.remove_adapter(0)
    emptied = driver.add(prompt, "ends_dora", max_tokens=8)
    driver.run()
    assert driver.generated(emptied) == expected(model, None, tuple(prompt), 12)[:8]


@cache
def read(model: Path, adapter: Path) -> HostAdapter:
    return read_local(AdapterRef("base/task", str(adapter)), open_checkpoint(model).spec)


def test_memory_is_accounted_for_before_it_is_taken(base):
    model, adapters = base
    runner = Driver(model).runner
    for name, path in adapters.items():
        adapter = read(model, path)
        prepared = runner.prepare_adapter(adapter)
        held = [prepared.slab, *(e.affine for e in prepared.modules.values() if e.affine is not None)]
        matrices = {}
        for end in (prepared.embedding, prepared.head):
            for linear in (end.matrix, end.a, end.b) if end else ():
                if linear is not None:
                    matrices[id(linear)] = linear.weight
            held += [end.affine] if end and end.affine is not None else []
        taken = sum(tensor.nbytes for tensor in (*held, *matrices.values()))
        # Packed weights come in panels of 32 outputs.
        assert taken <= adapter.device_bytes(4) + 32 * 64 * 4 * len(matrices), name


def change(adapter: Path, target: Path, change_tensors=None, **config: Any) -> Path:
    """A copy of an adapter with other tensors or another configuration."""
    shutil.copytree(adapter, target)
    tensors = load_file(target / "adapter_model.safetensors")
    save_file((change_tensors or dict)(tensors), target / "adapter_model.safetensors")
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_older_spellings_of_tensor_names_mean_the_same(base, tmp_path):
    model, adapters = base

    def older(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            name = name.replace("lora_A.weight", "lora_A.default.weight")
            name = name.replace("lora_embedding_B", "lora_embedding_B.default")
            renamed[name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")] = tensor
        return renamed

    was = read(model, adapters["ends_dora"])
    now = read(model, change(adapters["ends_dora"], tmp_path / "older", older))
    for place, weights in was.modules.items():
        for one, other in zip(weights.tensors(), now.modules[place].tensors(), strict=True):
            assert torch.equal(one, other)
    assert len(was.ends) == len(now.ends) == 2
    for one, other in zip(was.ends, now.ends, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head"


@pytest.mark.parametrize(
    ("name", "added", "config", "message"),
    [
        ("plain", {f"{Q0}.lora_magnitude_vector": 64}, {}, "q_proj has a magnitude, which .* no use for"),
        ("plain", {f"{Q0}.base_layer.bias": 64}, {}, "q_proj has a bias, which .* no use for .bias 'none'"),
        ("plain", {f"{Q0}.lora_B.bias": 64}, {}, "q_proj has a lora_bias"),
        ("plain", {f"{HEAD}.weight": (384, 64)}, {}, "lm_head has a weight"),
        ("plain", {f"{Q0}.weight": (64, 64)}, {}, "q_proj has a weight"),
        ("plain", {f"{Q0}.lora_A.default.weight": (8, 64)}, {}, "stored twice, under two names"),
        ("bias_lora_only", {f"{Q0}.bias": 64}, {}, "q_proj has a bias"),
        (
            "bias_all",
            {"base_model.model.model.norm.bias": 64},
            {},
            r"norm\.bias: trained biases are served on",
        ),
        ("bias_all", {f"{Q0}.base_layer.bias": 65}, {}, r"q_proj.bias has shape \[65\], expected \[64\]"),
        ("plain", {f"{Q0}.lora_C": 64}, {}, "lora_C is nothing that a LoRA adapter"),
        ("ends", {f"{HEAD}.weight": (384, 64)}, {"modules_to_save": ["lm_head"]}, "lm_head has a weight"),
        ("dora", {f"{Q0}.lora_magnitude_vector": 64, f"{Q0}.lora_B.bias": 64}, {}, "has a lora_bias"),
    ],
)
def test_a_tensor_without_a_meaning_is_refused(name, added, config, message, tmp_path, tmp_path_factory):
    model, adapters = made(Path(tmp_path_factory.getbasetemp()), "qwen2")
    extra = {key: torch.zeros(shape) for key, shape in added.items()}
    broken = change(adapters[name], tmp_path / "broken", lambda tensors: tensors | extra, **config)
    with pytest.raises(AdapterError, match=message):
        read(model, broken)


def test_an_adapter_of_another_base_is_refused_when_it_is_prepared(tmp_path, tmp_path_factory):
    folder = Path(tmp_path_factory.getbasetemp())
    model, adapters = made(folder, "qwen2")

    def stretched(tensors):
        return {name: t * 1.5 if "base_layer.weight" in name else t for name, t in tensors.items()}

    other = change(adapters["ends"], tmp_path / "other", stretched)
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight is not this base's"):
        Driver(model).runner.prepare_adapter(read(model, other))
    unbiased, _ = made(folder, "llama")
    bias = {f"{Q0}.base_layer.bias": torch.zeros(128)}
    biased = change(made(folder, "llama")[1]["bias_all"], tmp_path / "biased", lambda t: t | bias)
    with pytest.raises(AdapterError, match="a bias for q_proj of layer 0, where this base has none"):
        Driver(unbiased).runner.prepare_adapter(read(unbiased, biased))
    flat = change(
        adapters["dora"],
        tmp_path / "flat",
        lambda tensors: {n: t if "magnitude" not in n else t / 0.0 for n, t in tensors.items()},
    )
    with pytest.raises(AdapterError, match="holds NaN or infinite"):
        read(model, flat)
