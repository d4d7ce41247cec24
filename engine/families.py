"""The families of decoders: what all models of one have in common, as a table. Knows no config and no weights."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

_GATED = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
_GATED_GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_PRE_NORMS = {"input": "input_layernorm", "mlp": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "input": "input_layernorm",
    "attended": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "delta": "post_feedforward_layernorm",
}
_SILU = {"silu": "silu", "swish": "silu"}
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One class of transformers; the defaults are those of Llama."""

    name: str
    keys: Mapping[str, Any] = MappingProxyType({})
    """Optional keys of its configs, and what transformers assumes where one is missing. A key that differs between
    families and is not in here means nothing for this one."""
    activations: Mapping[str, str] = MappingProxyType(_SILU)
    """Served activations as configs call them, and as `ModelSpec` does; the first one is assumed."""
    activation_key: str = "hidden_act"
    modules: Mapping[str, str] = MappingProxyType(_GATED)
    """Every projection of a layer, and the block it is in."""
    groups: Mapping[str, tuple[str, ...]] = MappingProxyType(_GATED_GROUPS)
    """The projections that are computed as one, because they read the same input: always these four."""
    layer_norms: Mapping[str, str] = MappingProxyType(_PRE_NORMS)
    """Names of a layer's norms by what they are for: "input", "mlp" before a block, "attended", "delta" after one."""
    final_norm: str = "model.norm"
    norm_eps_key: str = "rms_norm_eps"
    layer_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = False
    biased: bool = False
    """Whether every projection and the head have a bias."""
    parallel_blocks: bool = False
    scaled_embedding: bool = False
    """By the root of the hidden size."""


_QWEN_WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = Family(
    name="gemma",
    keys={"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True},
    # The first configs say "gelu" and mean its form with tanh; transformers reads them so too.
    activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu_tanh"},
    norm_offset=1.0,
    scaled_embedding=True,
)
_GEMMA2 = msgspec.structs.replace(
    _GEMMA,
    name="gemma2",
    keys={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "layer_types": None,
    },
    activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
    activation_key="hidden_activation",
    layer_norms=_SANDWICH_NORMS,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(name="llama", keys={"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Family(name="mistral", keys={"num_key_value_heads": 8, "sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(
        name="qwen2", keys={"num_key_value_heads": 32, **_QWEN_WINDOWS}, qkv_bias=True
    ),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        keys={"head_dim": 128, "num_key_value_heads": 32, "attention_bias": False, **_QWEN_WINDOWS},
        qk_norm=True,
    ),
    "PhiForCausalLM": Family(
        name="phi",
        keys={"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
        activations=_GELU,
        modules={
            "q_proj": "self_attn",
            "k_proj": "self_attn",
            "v_proj": "self_attn",
            "dense": "self_attn",
            "fc1": "mlp",
            "fc2": "mlp",
        },
        groups={
            "qkv": ("q_proj", "k_proj", "v_proj"),
            "o": ("dense",),
            "gate_up": ("fc1",),
            "down": ("fc2",),
        },
        layer_norms={"input": "input_layernorm"},
        final_norm="model.final_layernorm",
        norm_eps_key="layer_norm_eps",
        layer_norm=True,
        biased=True,
        parallel_blocks=True,
    ),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": msgspec.structs.replace(
        _GEMMA2,
        name="gemma3",
        keys={
            **_GEMMA2.keys,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        qk_norm=True,
    ),
}
"""By the class that configs name."""
