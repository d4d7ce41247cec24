"""Quantised weights: equal to bitsandbytes', the same in every kernel, and with adapters equal to PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.__main__ import model_facts
from engine.checkpoint import CheckpointError, open_checkpoint
from engine.config import ConfigError, EngineConfig, check_config
from engine.kernels import CompileError
from engine.kernels.code_panels import CodePanels
from engine.kernels.native import NativeKernels
from engine.kernels.reference import ReferenceKernels
from engine.model import Decoder
from engine.quant import (
    Int8Weight,
    Nf4Weight,
    QuantisedWeight,
    Quantization,
    QuantizationError,
    quantise,
    stack,
)
from tests.engine.driving import Driver
from tests.engine.tiny import VOCABULARY, write_tiny_adapter, write_tiny_model

GOLDEN = Path(__file__).with_name("nf4_golden.safetensors")
"""Written by bitsandbytes 0.50.2 on the CPU: `python -m tests.engine.test_quant`."""
DTYPES = [torch.float32, torch.bfloat16]


def quantised(weight: torch.Tensor, form: Quantization) -> QuantisedWeight:
    made = quantise(weight, form)
    assert not isinstance(made, torch.Tensor)
    return made


def native(dtype: torch.dtype) -> NativeKernels:
    try:
        return NativeKernels(dtype)
    except CompileError as error:
        pytest.skip(f"no native kernels: {error}")


def bitsandbytes_dense(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes makes of a 4-bit weight. As one row: its CPU kernel takes the wrong scale (0.50.2; its CUDA
    kernel and its torch form do not) where a block begins in one row and ends in the next."""
    functional = pytest.importorskip("bitsandbytes.functional")
    shape, state.dtype, state.shape = state.shape, dtype, torch.Size([1, state.shape.numel()])
    dense = functional.dequantize_4bit(codes, state).view(shape)
    state.shape = shape
    return dense


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize("name", ["whole", "straddling"])
def test_nf4_is_made_and_read_as_bitsandbytes_does(golden, name):
    weight = golden[f"{name}.weight"]
    made = quantised(weight, "nf4")
    assert isinstance(made, Nf4Weight)
    assert torch.equal(made.codes, golden[f"{name}.codes"])
    assert torch.equal(made.absmax, golden[f"{name}.absmax"])
    for dtype in DTYPES:
        assert torch.equal(made.dense(dtype), golden[f"{name}.{dtype}".replace("torch.", "")])
    every = torch.arange(weight.shape[0])
    assert torch.equal(made.rows(every), golden[f"{name}.float32"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 128), (33, 576), (5, 96), (3, 40)])
def test_nf4_equals_an_installed_bitsandbytes(dtype, shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight[0] = 0
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    made = quantised(weight, "nf4")
    assert isinstance(made, Nf4Weight)
    assert torch.equal(made.codes, codes.view(-1))
    assert torch.equal(made.dense(dtype), bitsandbytes_dense(codes, state, dtype))


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
def test_a_quantised_weight_is_close_to_the_weight(form: Quantization):
    torch.manual_seed(0)
    weight = torch.randn(70, 192)
    made = quantised(weight, form)
    error = ((made.dense(torch.float32) - weight).norm() / weight.norm()).item()
    assert error < {"int8": 0.01, "nf4": 0.1, "fp8": 0.04}[form]
    assert made.nbytes < weight.nbytes * {"int8": 0.26, "nf4": 0.142, "fp8": 0.26}[form]
    assert torch.equal(
        quantised(made.dense(torch.float32), form).dense(torch.float32), made.dense(torch.float32)
    )


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
def test_rows_of_zeros_stay_zero_and_what_is_not_finite_is_refused(form: Quantization):
    weight = torch.zeros(3, 64)
    weight[1] = 1
    assert torch.equal(quantised(weight, form).dense(torch.float32), weight)
    weight[2, 5] = torch.inf
    with pytest.raises(QuantizationError, match="not finite"):
        quantise(weight, form)


def test_the_fp8_product_is_that_of_its_codes_and_scales():
    torch.manual_seed(0)
    weight, x, bias = torch.randn(24, 64), torch.randn(5, 64) * 100, torch.randn(24)
    made = quantised(weight, "fp8")
    found, expected = made.product(x, bias), x @ weight.T + bias
    assert ((found - expected).norm() / expected.norm()).item() < 0.05
    rounded = quantised(x, "fp8").dense(torch.float32)
    torch.testing.assert_close(found, rounded @ made.dense(torch.float32).T + bias, rtol=1e-4, atol=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(["int8", "nf4"]),
    st.integers(1, 140),
    st.sampled_from([2, 34, 64, 96, 128, 320, 576]),
    st.sampled_from([1, 7, 32, 33, 100, 2100]),
    st.booleans(),
    st.data(),
)
def test_a_native_product_is_that_of_the_dequantised_weight_for_each_row_alone(
    dtype, form, rows, inputs, outputs, biased, data
):
    torch.manual_seed(0)
    ours, twin = native(dtype), ReferenceKernels()
    weight = quantised(torch.randn(outputs, inputs).to(dtype) / inputs**0.5, form)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype) if biased else None
    packed, plain = ours.pack_linear(weight, bias), twin.pack_linear(weight, bias)
    exact = weight.dense(dtype if form == "nf4" else torch.float32).float()
    expected = x.float() @ exact.T + (0 if bias is None else bias.float())
    found = ours.logits(x, packed)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(twin.logits(x, plain), expected, rtol=tolerance, atol=tolerance)
    out = ours.linear(x, packed)
    assert torch.equal(out, found.to(dtype))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(ours.linear(x[start:stop].clone(), packed), out[start:stop])
    ids = torch.randint(outputs, (5,))
    assert torch.equal(ours.embed(ids, packed).to(dtype), twin.embed(ids, plain).to(dtype))


def test_panels_are_as_small_as_promised():
    weight = torch.randn(960, 576)
    for form, share in (("int8", 0.505), ("nf4", 0.285)):
        packed = native(torch.bfloat16).pack_linear(quantised(weight, form), None)  # type: ignore[arg-type]
        assert isinstance(packed, CodePanels)
        assert packed.nbytes < share * 2 * weight.numel()


def test_stacked_weights_are_one_after_the_other():
    torch.manual_seed(0)
    first, second = torch.randn(8, 64), torch.randn(4, 64)
    for form, made in (("int8", Int8Weight), ("nf4", Nf4Weight)):
        stacked = stack([quantised(first, form), quantised(second, form)], torch.float32)  # type: ignore[arg-type]
        assert isinstance(stacked, made)
        parts = [quantised(part, form).dense(torch.float32) for part in (first, second)]  # type: ignore[arg-type]
        assert torch.equal(stacked.dense(torch.float32), torch.cat(parts))
    mixed = stack([quantised(first, "nf4"), second], torch.float32)
    assert isinstance(mixed, torch.Tensor) and torch.equal(mixed[8:], second)


# ---- models ----


def dequantised_twin(model: Path, folder: Path, quantization: Quantization) -> Path:
    """The same model with the weights that the engine computes with, in float32."""
    decoder = Decoder(
        open_checkpoint(model), torch.float32, ReferenceKernels(), 64, quantization=quantization
    )
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights, spec = {}, decoder.spec
    for name, shape in spec.tensor_shapes().items():
        parts = name.split(".")
        if "layers" in parts and parts[-2] in spec.family.modules and parts[-1] == "weight":
            weights[name] = decoder.rows(int(parts[2]), parts[-2], 0, shape[0]).contiguous()
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = decoder.rows(None, parts[-2], 0, shape[0]).contiguous()
        else:
            weights[name] = open_checkpoint(model).tensor(name, torch.float32).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.inference_mode()
def greedy(model: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        oracle = peft.PeftModel.from_pretrained(oracle, str(adapter)).eval()
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "nf4"), ("llama3", "int8"), ("qwen2", "nf4"), ("phi", "int8")]
)
def test_greedy_tokens_equal_transformers_and_peft_on_the_dequantised_weights(
    tmp_path, family, quantization: Quantization, kernels
):
    model = write_tiny_model(tmp_path / "model", family)
    targets = ["q_proj", "v_proj", "fc1" if family == "phi" else "gate_proj"]
    adapter = write_tiny_adapter(tmp_path / "adapter", model, 4, targets, seed=1)
    twin = dequantised_twin(model, tmp_path / "twin", quantization)
    driver = Driver(model, {"adapter": adapter}, quantization=quantization, kernels=kernels)
    prompt = torch.randint(3, VOCABULARY, (21,), generator=torch.Generator().manual_seed(5)).tolist()
    made = [driver.add(prompt, None, max_tokens=12), driver.add(prompt, "adapter", max_tokens=12)]
    driver.run()
    for sequence, path in zip(made, (None, adapter), strict=True):
        assert driver.generated(sequence) == greedy(twin, path, prompt, 12)
    assert driver.generated(made[0]) != driver.generated(made[1])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "nested"])
def stored(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and the same as transformers and bitsandbytes save it in 4 bits."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("bnb")
    model = write_tiny_model(folder / "full", "llama")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        llm_int8_skip_modules=["lm_head", "k_proj"],
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=config
    )
    loaded.save_pretrained(folder / "stored")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / "stored" / name)
    return model, folder / "stored"


def test_a_checkpoint_of_bitsandbytes_is_read_as_bitsandbytes_reads_it(stored):
    functional = pytest.importorskip("bitsandbytes.functional")
    _, saved = stored
    checkpoint, tensors = open_checkpoint(saved), load_file(saved / "model.safetensors")
    assert checkpoint.quantization == "nf4"
    states = [name for name in tensors if name.endswith("quant_state.bitsandbytes__nf4")]
    assert len(states) == 3 * 6
    for entry in states:
        name = entry.removesuffix(".quant_state.bitsandbytes__nf4")
        parts = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        if state.nested:
            state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested = False
        expected = bitsandbytes_dense(tensors[name], state, torch.float32)
        assert torch.equal(checkpoint.tensor(name, torch.float32), expected), name
    for name in ("lm_head.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert checkpoint.quantised(name) is None
        assert torch.equal(checkpoint.tensor(name, torch.float32), tensors[name])


def test_a_checkpoint_of_bitsandbytes_is_served_with_an_adapter(stored, tmp_path):
    model, saved = stored
    adapter = write_tiny_adapter(tmp_path / "adapter", model, 4, ["q_proj", "down_proj"], seed=2)
    twin = dequantised_twin(saved, tmp_path / "twin", "none")
    driver = Driver(saved, {"adapter": adapter})
    prompt = [5, 9, 300, 41, 8]
    sequence = driver.add(prompt, "adapter", max_tokens=12)
    driver.run()
    assert driver.generated(sequence) == greedy(twin, adapter, prompt, 12)


@pytest.mark.parametrize(
    ("part", "damage", "reason"),
    [
        ("absmax", lambda tensor: tensor[:-1], "absmax has"),
        ("quant_map", lambda tensor: tensor * 0, "levels of nf4"),
        ("", lambda tensor: tensor[:-1], "bytes of codes"),
        ("quant_state.bitsandbytes__nf4", lambda tensor: tensor[3:], "not JSON"),
        ("quant_map", None, "quant_map is missing"),
    ],
)
def test_a_damaged_4bit_checkpoint_is_refused_by_its_part(stored, tmp_path, part, damage, reason):
    _, saved = stored
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    tensors, weight = load_file(broken / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    name = f"{weight}.{part}" if part else weight
    if damage is None:
        del tensors[name]
    else:
        tensors[name] = damage(tensors[name]).clone()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(broken).tensor(weight, torch.float32)


def test_what_is_quantised_is_not_quantised_again(stored):
    with pytest.raises(CheckpointError, match="stored as nf4"):
        Driver(stored[1], quantization="int8")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "'fp4'"),
        ([4], "must be an object"),
    ],
)
def test_other_quantised_checkpoints_are_refused(tmp_path, config, reason):
    model = write_tiny_model(tmp_path, "llama")
    document = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(document | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=f"quantization_config: .*{reason}"):
        open_checkpoint(model)


def test_weights_take_less_memory_and_the_facts_say_how_they_are_held(tmp_path):
    model = write_tiny_model(tmp_path, "llama3")
    checkpoint, facts, sizes = open_checkpoint(model), {}, {}
    for quantization in ("none", "int8", "nf4"):
        config = EngineConfig(model=str(model), name="tiny", quantization=quantization)
        facts[quantization] = model_facts(config, checkpoint, 64)
        decoder = Decoder(checkpoint, torch.bfloat16, ReferenceKernels(), 64, quantization=quantization)
        sizes[quantization] = decoder.weight_bytes
    assert sizes["int8"] < 0.6 * sizes["none"] and sizes["nf4"] < 0.6 * sizes["none"]
    assert [fact.quantization for fact in facts.values()] == ["none", "int8", "nf4"]
    assert len({fact.digest for fact in facts.values()}) == 3


def test_fp8_is_refused_on_the_cpu():
    config = EngineConfig(model="m", name="n", quantization="fp8")
    with pytest.raises(ConfigError, match="CUDA"):
        check_config(config, "file")
    check_config(msgspec.structs.replace(config, quantization="nf4"), "file")


def _write_golden() -> None:
    import bitsandbytes.functional as functional

    torch.manual_seed(0)
    tensors = {}
    for name, shape in {"whole": (6, 128), "straddling": (5, 96)}.items():
        weight = (torch.randn(shape) * torch.rand(shape[0], 1) * 0.1).bfloat16()
        weight[1, :70] = 0
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        tensors |= {f"{name}.weight": weight, f"{name}.codes": codes.view(-1), f"{name}.absmax": state.absmax}
        for dtype in DTYPES:
            tensors[f"{name}.{dtype}".replace("torch.", "")] = bitsandbytes_dense(codes, state, dtype)
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    _write_golden()
