"""PEFT directories: the same weights and scalings as peft, and a named cause for every bad one."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.families import FAMILIES
from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.protocol import AdapterRef
from engine.sources import local_version
from engine.spec import ModelSpec
from tests.engine.driving import read_local
from tests.engine.tiny import write_tiny_adapter, write_tiny_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LINEARS = FAMILIES["LlamaForCausalLM"].modules


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def spec(model_dir: Path) -> ModelSpec:
    return open_checkpoint(model_dir).spec


@pytest.fixture(scope="module")
def pristine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapter"), model_dir, 4, ["q_proj", "v_proj"])


@pytest.fixture
def adapter_dir(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "adapter"))


def _path(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{LINEARS[module]}.{module}"


def ref(directory: Path | str, name: str = "base/task", sha256: str | None = None) -> AdapterRef:
    return AdapterRef(name, str(directory), sha256)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def key(layer: int, module: str, half: str) -> str:
    return f"base_model.model.{_path(layer, module)}.lora_{half}.weight"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "v_proj"], {}),
        ("all-linear", {"rslora": True, "alpha": 8}),
        (["k_proj", "o_proj", "down_proj"], {"alpha": 1}),
        (["gate_proj", "up_proj"], {"rank_pattern": {"gate_proj": 2, "layers.1.mlp.up_proj": 16}}),
        ("all-linear", {"alpha_pattern": {"self_attn.q_proj": 5, r"model.layers.[12].mlp.down_proj": 64}}),
        ("all-linear", {"rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}}),
        (r".*\.1\.(self_attn|mlp)\.(q|down)_proj", {}),
    ],
)
def test_weights_and_scalings_are_those_of_peft(
    targets: Any, options: dict[str, Any], model_dir: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    adapter = read_local(ref(write_tiny_adapter(tmp_path, model_dir, 4, targets, seed=3, **options)), spec)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    layers = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert {f"base_model.model.{_path(*place)}" for place in adapter.modules} == set(layers)
    for place, ours in adapter.modules.items():
        layer: Any = layers[f"base_model.model.{_path(*place)}"]
        assert torch.equal(ours.a, layer.lora_A["default"].weight)
        assert torch.equal(ours.b, layer.lora_B["default"].weight)
        assert ours.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
    assert adapter.rank == max(ours.a.shape[0] for ours in adapter.modules.values())
    assert adapter.num_bytes == sum(
        (ours.a.numel() + ours.b.numel()) * 4 for ours in adapter.modules.values()
    )


def test_weights_stay_in_the_dtype_they_were_stored_in(adapter_dir: Path, spec: ModelSpec) -> None:
    change_weights(adapter_dir, lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items()}))
    adapter = read_local(ref(adapter_dir), spec)
    assert adapter.modules[0, "q_proj"].a.dtype == torch.bfloat16


def test_the_digest_is_of_what_is_computed(pristine: Path, adapter_dir: Path, spec: ModelSpec) -> None:
    digest = read_local(ref(pristine), spec).digest
    change_config(adapter_dir, lora_dropout=0.5, revision="main")
    assert read_local(ref(adapter_dir, name="base/other"), spec).digest == digest
    change_config(adapter_dir, lora_alpha=3)
    scaled = read_local(ref(adapter_dir), spec).digest
    change_weights(adapter_dir, lambda weights: weights[key(0, "q_proj", "A")].add_(1))
    assert len({digest, scaled, read_local(ref(adapter_dir), spec).digest}) == 3


def test_a_pinned_sha256_must_match(pristine: Path, spec: ModelSpec) -> None:
    sha256 = hashlib.sha256((pristine / WEIGHTS).read_bytes()).hexdigest()
    assert read_local(ref(pristine, sha256=sha256.upper()), spec).rank == 4
    with pytest.raises(AdapterError, match=f"its sha256 is {sha256}, the catalog says 0{{64}}"):
        read_local(ref(pristine, sha256="0" * 64), spec)


def test_a_file_uri_is_a_path(pristine: Path, tmp_path: Path, spec: ModelSpec) -> None:
    spaced = Path(shutil.copytree(pristine, tmp_path / "with space"))
    assert read_local(ref(spaced.as_uri()), spec).digest == read_local(ref(pristine), spec).digest
    with pytest.raises(AdapterError, match="cannot name a host"):
        local_version("file://host/adapter")


def test_a_version_changes_when_an_adapter_is_published_anew(adapter_dir: Path) -> None:
    before = local_version(str(adapter_dir))
    assert local_version(str(adapter_dir)) == before
    os.utime(adapter_dir / WEIGHTS, ns=(1, 1))
    assert local_version(str(adapter_dir)) != before


@pytest.mark.parametrize("uri", ["/no/such/directory", "", "\0", "x" * 5000, "file:///no/such"])
def test_an_absent_adapter_is_not_found(uri: str, spec: ModelSpec) -> None:
    with pytest.raises(AdapterNotFoundError):
        local_version(uri)
    with pytest.raises(AdapterNotFoundError):
        read_local(ref(uri), spec)


def _only_a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def _renamed_pickle(directory: Path) -> None:
    torch.save({"x": torch.zeros(2)}, directory / WEIGHTS)


def _cut(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_only_a_pickle, r"adapter_model\.bin: a pickle, which is never read"),
        (_renamed_pickle, r"adapter_model\.safetensors: a pickle, not safetensors"),
        (_cut, r"adapter_model\.safetensors: not a whole safetensors file"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), r"not a whole safetensors file"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 100), r"not a whole safetensors file"),
        (lambda d: (d / WEIGHTS).unlink(), r"adapter_model\.safetensors is missing"),
        (lambda d: (d / CONFIG).unlink(), r"adapter_config\.json is missing"),
        (lambda d: (d / CONFIG).write_text("{"), r"adapter_config\.json: not JSON"),
        (lambda d: (d / CONFIG).write_bytes(b"\xff"), r"adapter_config\.json: not JSON"),
        (lambda d: (d / CONFIG).write_text("[" * 100_000), r"adapter_config\.json: not JSON"),
        (lambda d: (d / CONFIG).write_text("[]"), r"adapter_config\.json: not a JSON object"),
        (lambda d: (d / CONFIG).write_text("{}"), r"adapter_config\.json: peft_type is None"),
    ],
)
def test_a_damaged_directory_names_file_and_cause(
    damage: Callable[[Path], object], message: str, adapter_dir: Path, spec: ModelSpec
) -> None:
    damage(adapter_dir)
    with pytest.raises(AdapterError, match=message):
        read_local(ref(adapter_dir), spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector, use_dora is true"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"use_dora": True, "lora_bias": True}, "use_dora together with lora_bias"),
        ({"use_dora": True, "ensure_weight_tying": True}, "use_dora together with ensure_weight_tying"),
        ({"use_brand_new_thing": True}, "use_brand_new_thing is True"),
        ({"bias": "some"}, "bias must be .* it is 'some'"),
        ({"lora_bias": True}, "q_proj has no lora_B.bias, lora_bias is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but .* has none"),
        ({"modules_to_save": ["norm"]}, "modules_to_save names 'norm'; only embed_tokens and lm_head"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights is"),
        (
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            "has nothing for 1 of the base's 1, first lm_head",
        ),
        ({"target_modules": ["q_proj", "v_proj", "model.embed_tokens"]}, "first model.embed_tokens"),
        ({"target_modules": ["q_proj"]}, "target_modules does not name v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "has nothing for 3 of the base's 3"),
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "'c_attn', which this base does not have"),
        ({"target_modules": None}, "target_modules must be a name"),
        ({"target_modules": [1]}, "target_modules must be a name"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be"),
        ({"r": None}, "r must be a whole number from 1 to 1024, it is None"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 10**30}, "r must be a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern.q_proj must be a whole number"),
        ({"alpha_pattern": {"(": 2}}, r"'\(' is no pattern"),
        ({"alpha_pattern": {"((a+)+)+b": 2}}, "is too complex"),
        ({"r": 8}, r"q_proj.lora_A has shape \[4, 64\], expected \[8, 64\] \(rank 8 by adapter_config"),
    ],
)
def test_a_config_that_cannot_be_served_names_its_key(
    changes: dict[str, Any], message: str, adapter_dir: Path, spec: ModelSpec
) -> None:
    change_config(adapter_dir, **changes)
    with pytest.raises(AdapterError, match=message):
        read_local(ref(adapter_dir), spec)


Q_A, Q_B = key(0, "q_proj", "A"), key(0, "q_proj", "B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({Q_A: torch.zeros(4, 65)}),
            r"q_proj.lora_A has shape \[4, 65\], expected \[4, 64\]",
        ),
        (
            lambda w: w.update({Q_B: torch.zeros(64, 4)}),
            r"q_proj.lora_B has shape \[64, 4\], expected \[128, 4\]",
        ),
        (lambda w: w.update({Q_B: torch.zeros(4)}), r"lora_B has shape \[4\]"),
        (lambda w: w.pop(Q_A), r"model.layers.0.self_attn.q_proj has lora_B but no lora_A"),
        (lambda w: w.pop(Q_B), r"model.layers.0.self_attn.q_proj has lora_A but no lora_B"),
        (lambda w: w[Q_A].fill_(float("nan")), r"q_proj.lora_A holds NaN or infinite values"),
        (lambda w: w[Q_B][0].fill_(float("inf")), r"q_proj.lora_B holds NaN or infinite values"),
        (lambda w: w.update({Q_A: torch.zeros(4, 64, dtype=torch.int8)}), r"q_proj.lora_A is torch.int8"),
        (lambda w: w.clear(), r"holds no weights"),
        (
            lambda w: w.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
            r"lm_head has lora_A but no lora_B",
        ),
        (
            lambda w: w.update({"base_model.model.model.norm.weight": torch.zeros(64)}),
            r"model.norm.weight is not a LoRA weight of a projection",
        ),
        (
            lambda w: w.update({Q_A.replace("self_attn", "mlp"): torch.zeros(4, 64)}),
            r"model.layers.0.mlp.q_proj.lora_A.weight is not a LoRA weight",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_tensor(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, adapter_dir: Path, spec: ModelSpec
) -> None:
    change_weights(adapter_dir, change)
    with pytest.raises(AdapterError, match=message):
        read_local(ref(adapter_dir), spec)


def test_an_adapter_of_a_deeper_or_shallower_base_is_refused(pristine: Path, spec: ModelSpec) -> None:
    shallow, deep = (msgspec.structs.replace(spec, num_layers=layers) for layers in (2, 4))
    with pytest.raises(
        AdapterError, match=r"model.layers.2.*: this base has 2 layers; the adapter's config names"
    ):
        read_local(ref(pristine), shallow)
    with pytest.raises(
        AdapterError, match=r"nothing for 1 of the base's 4, first model.layers.3.self_attn.q_proj;"
    ):
        read_local(ref(pristine), deep)


def test_layers_left_out_on_purpose_are_no_error(adapter_dir: Path, spec: ModelSpec) -> None:
    change_weights(adapter_dir, lambda w: [w.pop(name) for name in list(w) if ".layers.1." not in name])
    change_config(adapter_dir, layers_to_transform=[1])
    assert set(read_local(ref(adapter_dir), spec).modules) == {(1, "q_proj"), (1, "v_proj")}


@pytest.mark.parametrize(
    ("trained_on", "served", "refused"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", False),
        ("HuggingFaceTB/SmolLM-135M-Instruct", "smollm2-135m", True),
        ("meta-llama/Llama-2-7b-hf", "smollm2-135m", True),
        ("meta-llama/Llama-2-7b-hf", "llama-3-8b", True),
        ("meta-llama/Meta-Llama-3-8B", "llama3-8b", False),
        ("meta-llama/Llama-3.1-8B", "llama", False),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b", False),
        ("HuggingFaceH4/zephyr-7b-beta", "mistral-7b", True),
        ("/models/mistral/checkpoint-600", "smollm2-135m", False),
        ("/models/smollm-finetuned", "smollm2-135m", False),
        ("Qwen/Qwen2.5-0.5B", "my-model", False),
        ("", "smollm2-135m", False),
    ],
)
def test_an_adapter_that_names_another_base_is_refused(
    trained_on: str, served: str, refused: bool, adapter_dir: Path, spec: ModelSpec
) -> None:
    change_config(adapter_dir, base_model_name_or_path=trained_on)
    if not refused:
        assert read_local(ref(adapter_dir, name=f"{served}/task"), spec).rank == 4
        return
    with pytest.raises(
        AdapterError, match=f"names another base: '{trained_on}', but the model served is '{served}'"
    ):
        read_local(ref(adapter_dir, name=f"{served}/task"), spec)


def test_a_file_larger_than_any_adapter_is_not_read(adapter_dir: Path, spec: ModelSpec) -> None:
    with (adapter_dir / WEIGHTS).open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(AdapterError, match="are possible for this base"):
        read_local(ref(adapter_dir), spec)


def test_every_projection_can_be_adapted(model_dir: Path, spec: ModelSpec, tmp_path: Path) -> None:
    adapter = read_local(ref(write_tiny_adapter(tmp_path, model_dir, 2, "all-linear")), spec)
    assert set(adapter.modules) == {(layer, module) for layer in range(3) for module in LINEARS}
