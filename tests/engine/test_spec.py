"""Configs as transformers writes them, and what is refused."""

import copy
import math
from typing import Any

import pytest
import transformers

from engine.families import FAMILIES
from engine.spec import ModelSpec, RopeScaling, SpecError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 8}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 4}


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config(config | changes)


def test_a_config_of_transformers_4_and_of_5_give_the_same_spec() -> None:
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert read(new) == read(LLAMA)
    assert read(LLAMA).rope_theta == 1e6


REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
REQUIRED |= {"max_position_embeddings", "eos_token_id", "bos_token_id"}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_assumes(architecture: str) -> None:
    name = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    written = config(num_hidden_layers=7).to_dict()
    sparse = {key: value for key, value in written.items() if key in REQUIRED}
    spec = ModelSpec.from_hf_config(written | {"architectures": [architecture]})
    assert ModelSpec.from_hf_config(sparse | {"architectures": [architecture]}) == spec
    assert set(FAMILIES[architecture].keys) <= set(written) | {
        "sliding_window_pattern",
        "rope_theta",
        "rope_local_base_freq",
        "partial_rotary_factor",
    }


def test_head_dim_may_differ_from_hidden_size_over_heads() -> None:
    assert read(LLAMA).head_dim == 16
    assert read(LLAMA, head_dim=32).linear_shape("q_proj") == (128, 64)
    assert read(LLAMA, head_dim=32).linear_shape("k_proj") == (64, 64)
    assert read(LLAMA, head_dim=32).linear_shape("o_proj") == (64, 128)


def test_llama_without_grouped_queries_has_a_key_head_per_head() -> None:
    assert read(LLAMA, num_key_value_heads=None).num_kv_heads == 4


def test_end_tokens_may_be_one_or_many() -> None:
    assert read(LLAMA).eos_token_ids == (2,)
    assert read(LLAMA, eos_token_id=[5, 7]).eos_token_ids == (5, 7)
    assert read(LLAMA, eos_token_id=None).eos_token_ids == ()


def test_llama3_scaling_is_read_from_both_layouts() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert read(LLAMA, rope_scaling=scaling | {"type": "llama3"}).rope_scaling == expected
    new = read(LLAMA, rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 7.0})
    assert (new.rope_scaling, new.rope_theta) == (expected, 7.0)


def test_qwen2_has_biases_on_queries_keys_and_values_only() -> None:
    spec = read(QWEN2)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, False, False)
    llama = read(LLAMA, attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("config", "changes", "window"),
    [
        (MISTRAL, {}, 8),
        (MISTRAL, {"sliding_window": None}, None),
        (LLAMA, {"sliding_window": 8}, None),
        (QWEN2, {}, None),
        (QWEN2, {"use_sliding_window": True}, None),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 0}, 8),
        (QWEN2, {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, 8),
    ],
)
def test_the_window_is_the_one_transformers_uses(config: dict, changes: dict, window: int | None) -> None:
    assert read(config, **changes).windows == (window,) * 4


def test_a_window_in_some_layers_only() -> None:
    assert read(QWEN2, use_sliding_window=True, max_window_layers=2).windows == (None, None, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "architectures: 'FalconForCausalLM' is not supported"),
        ({"architectures": None}, "architectures must name one class"),
        ({"architectures": [["x"]]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act: only silu and swish are supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling.factor"),
        ({"rope_scaling": 8}, "rope_scaling must be an object"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"hidden_size": True}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is larger than 4096"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_hf_config(copy.deepcopy(LLAMA) | changes)


def test_tensor_shapes_name_every_weight_of_the_model() -> None:
    config = transformers.Qwen2Config(**{k: v for k, v in QWEN2.items() if k != "architectures"})
    model = transformers.Qwen2ForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert read(QWEN2).tensor_shapes() == expected


def published(
    architecture: str, vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, **more: Any
):
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        **more,
    }


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # The bases of the LoRA Land report
        pytest.param(published("Llama", 32000, 4096, 11008, 32, 32), 6_738_415_616, id="Llama-2-7b"),
        pytest.param(
            published(
                "Mistral",
                32000,
                4096,
                14336,
                32,
                32,
                num_key_value_heads=8,
                sliding_window=4096,
                hidden_act="silu",
            ),
            7_241_732_096,
            id="Mistral-7B-v0.1, Zephyr-7b-beta",
        ),
        pytest.param(
            published(
                "Phi",
                51200,
                2560,
                10240,
                32,
                32,
                num_key_value_heads=32,
                partial_rotary_factor=0.4,
                hidden_act="gelu_new",
                layer_norm_eps=1e-5,
                qk_layernorm=False,
            ),
            2_779_683_840,
            id="phi-2",
        ),
        pytest.param(
            published(
                "Gemma", 256000, 2048, 16384, 18, 8, num_key_value_heads=1, head_dim=256, hidden_act="gelu"
            ),
            2_506_172_416,
            id="gemma-2b",
        ),
        pytest.param(
            published("Gemma", 256000, 3072, 24576, 28, 16, num_key_value_heads=16, head_dim=256),
            8_537_680_896,
            id="gemma-7b",
        ),
        # Today's
        pytest.param(
            published("Llama", 128256, 4096, 14336, 32, 32, num_key_value_heads=8, rope_scaling=LLAMA3_ROPE),
            8_030_261_248,
            id="Llama-3.1-8B",
        ),
        pytest.param(
            published(
                "Llama",
                128256,
                2048,
                8192,
                16,
                32,
                num_key_value_heads=8,
                head_dim=64,
                tie_word_embeddings=True,
                rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
            ),
            1_235_814_400,
            id="Llama-3.2-1B",
        ),
        pytest.param(
            published("Qwen2", 152064, 3584, 18944, 28, 28, num_key_value_heads=4, use_sliding_window=False),
            7_615_616_512,
            id="Qwen2.5-7B",
        ),
        pytest.param(
            published("Qwen3", 151936, 4096, 12288, 36, 32, num_key_value_heads=8, head_dim=128),
            8_190_735_360,
            id="Qwen3-8B",
        ),
        pytest.param(
            published(
                "Gemma2",
                256000,
                3584,
                14336,
                42,
                16,
                num_key_value_heads=8,
                head_dim=256,
                query_pre_attn_scalar=256,
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
                hidden_activation="gelu_pytorch_tanh",
                sliding_window=4096,
            ),
            9_241_705_984,
            id="gemma-2-9b",
        ),
        pytest.param(
            published(
                "Gemma3",
                262144,
                1152,
                6912,
                26,
                4,
                num_key_value_heads=1,
                head_dim=256,
                query_pre_attn_scalar=256,
                rope_local_base_freq=10000,
                rope_theta=1_000_000,
                rope_scaling=None,
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                sliding_window=512,
                sliding_window_pattern=6,
                hidden_activation="gelu_pytorch_tanh",
            ),
            999_885_952,
            id="gemma-3-1b",
        ),
        pytest.param(
            published("Llama", 49152, 576, 1536, 30, 9, num_key_value_heads=3, tie_word_embeddings=True),
            134_515_008,
            id="SmolLM2-135M",
        ),
    ],
)
def test_published_configs_give_the_published_number_of_parameters(config: dict, parameters: int) -> None:
    shapes = ModelSpec.from_hf_config(config).tensor_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_what_gemma_3_has_of_its_own() -> None:
    config = published(
        "Gemma3",
        64,
        64,
        96,
        7,
        4,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )
    spec = ModelSpec.from_hf_config(config)
    assert spec.windows == (8, 8, 8, 8, 8, None, 8)
    assert (spec.rope_theta, spec.local_rope_theta) == (1_000_000.0, 10_000.0)
    assert spec.tie_word_embeddings and spec.family.qk_norm and len(spec.family.layer_norms) == 4
    assert (spec.attention_scale, spec.embedding_scale, spec.attention_softcap) == (1 / 16, 8.0, None)
