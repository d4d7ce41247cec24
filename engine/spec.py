"""What a decoder is, read from a Hugging Face `config.json`. Knows no weights and no files."""

from collections.abc import Mapping
from typing import Any

import msgspec

from engine import bnb


class SpecError(Exception):
    """The model cannot be described as a `ModelSpec`; the message names the key of the config."""


class RopeScaling(msgspec.Struct, frozen=True):
    """How rotary frequencies are stretched. Only `factor` means anything for "linear"."""

    kind: str
    """"linear" or "llama3"."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder: what the families have in common, and a field for each thing in which they differ."""

    family: str
    """A key of `FAMILIES`' values, e.g. "llama"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    """Per layer, how many keys a query sees at most, itself included."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    attention_scale: float
    """What scores are multiplied with."""
    rotary_dim: int
    """How much of a head is rotated, from its beginning."""
    local_rope_theta: float | None = None
    """Rotary base of the layers with a window, without scaling; None: as in the others."""
    activation: str = "silu"
    """"silu" or "gelu_tanh"."""
    gated: bool = True
    """Whether the MLP multiplies the activation with a second projection."""
    layer_norm: bool = False
    """LayerNorm with bias instead of RMSNorm."""
    norm_offset: float = 0.0
    """Added to the weights of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before rotation."""
    sandwich_norms: bool = False
    """RMSNorm after attention and after the MLP as well as before them."""
    parallel_blocks: bool = False
    """Attention and MLP read the same normalised input, and are added together."""
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    logits_softcap: float | None = None
    head_bias: bool = False

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Read `config.json` as transformers 4 or 5 writes it. Raises `SpecError`."""
        reader = _ConfigReader(config)
        family = reader.family()
        reader.refuse_unsupported()
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        default_kv_heads = num_heads if family in ("llama", "phi") else None
        num_kv_heads = reader.size("num_key_value_heads", default_kv_heads)
        if num_heads % num_kv_heads:
            raise SpecError(
                f"num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads})"
            )
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise SpecError(
                f"hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_heads})"
            )
        head_dim = reader.size("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise SpecError(f"head_dim must be even, it is {head_dim}")
        num_layers = reader.size("num_hidden_layers", most=_MOST_LAYERS)
        rope_theta, rope_scaling = reader.rope()
        biased = family in ("llama", "qwen3") and reader.flag("attention_bias", False)
        gemma = family.startswith("gemma")
        scalar = reader.number("query_pre_attn_scalar", 256.0) if family in ("gemma2", "gemma3") else head_dim
        return cls(
            family=family,
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=reader.number("layer_norm_eps", 1e-5)
            if family == "phi"
            else reader.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=reader.size("max_position_embeddings"),
            windows=reader.windows(family, num_layers),
            qkv_bias=biased or family in ("qwen2", "phi"),
            o_bias=biased or family == "phi",
            mlp_bias=family == "phi" or (family == "llama" and reader.flag("mlp_bias", False)),
            tie_word_embeddings=reader.flag("tie_word_embeddings", gemma),
            eos_token_ids=reader.token_ids("eos_token_id"),
            bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
            attention_scale=scalar**-0.5,
            rotary_dim=reader.rotary_dim(family, head_dim),
            local_rope_theta=reader.local_rope_theta() if family == "gemma3" else None,
            activation=reader.activation(family),
            gated=family != "phi",
            layer_norm=family == "phi",
            norm_offset=1.0 if gemma else 0.0,
            qk_norm=family in ("qwen3", "gemma3"),
            sandwich_norms=family in ("gemma2", "gemma3"),
            parallel_blocks=family == "phi",
            embedding_scale=hidden_size**0.5 if gemma else 1.0,
            attention_softcap=reader.softcap("attn_logit_softcapping", family),
            logits_softcap=reader.softcap("final_logit_softcapping", family),
            head_bias=family == "phi",
        )

    @property
    def modules(self) -> dict[str, str]:
        """Every projection of a layer, and the block it is in."""
        return PHI_BLOCKS if self.family == "phi" else LINEAR_BLOCKS

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The projections that are computed as one, because they read the same input."""
        if self.family == "phi":
            return {
                "qkv": ("q_proj", "k_proj", "v_proj"),
                "o": ("dense",),
                "gate_up": ("fc1",),
                "down": ("fc2",),
            }
        return {
            "qkv": ("q_proj", "k_proj", "v_proj"),
            "o": ("o_proj",),
            "gate_up": ("gate_proj", "up_proj"),
            "down": ("down_proj",),
        }

    @property
    def layer_norms(self) -> dict[str, str]:
        """Names of a layer's norms by what they are for."""
        if self.parallel_blocks:
            return {"input": "input_layernorm"}
        if self.sandwich_norms:
            return {
                "input": "input_layernorm",
                "attended": "post_attention_layernorm",
                "mlp": "pre_feedforward_layernorm",
                "delta": "post_feedforward_layernorm",
            }
        return {"input": "input_layernorm", "mlp": "post_attention_layernorm"}

    @property
    def final_norm(self) -> str:
        return "model.final_layernorm" if self.family == "phi" else "model.norm"

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of a projection, e.g. "q_proj". Raises `KeyError` for another name."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        up, down = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "dense": (self.hidden_size, queries),
            "gate_proj": up,
            "up_proj": up,
            "fc1": up,
            "down_proj": down,
            "fc2": down,
        }[module]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model under its Hugging Face name, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }

        def add_norm(name: str) -> None:
            shapes[f"{name}.weight"] = (self.hidden_size,)
            if self.layer_norm:
                shapes[f"{name}.bias"] = (self.hidden_size,)

        add_norm(self.final_norm)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        if self.head_bias:
            shapes["lm_head.bias"] = (self.vocab_size,)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for norm in self.layer_norms.values():
                add_norm(f"{prefix}.{norm}")
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
            for module, block in self.modules.items():
                shape = self.linear_shape(module)
                shapes[f"{prefix}.{block}.{module}.weight"] = shape
                if self.has_bias(module):
                    shapes[f"{prefix}.{block}.{module}.bias"] = shape[:1]
        return shapes

    def has_bias(self, module: str) -> bool:
        if module in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if module in ("o_proj", "dense") else self.mlp_bias


LINEAR_BLOCKS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""Every projection of a layer, and the block it is in."""
PHI_BLOCKS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "dense": "self_attn",
    "fc1": "mlp",
    "fc2": "mlp",
}

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "PhiForCausalLM": "phi",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
"""Class named in a config -> family."""
_MOST_LAYERS = 4096
_DEFAULT_WINDOW = 4096
"""What transformers assumes for a Mistral or Qwen2 config without `sliding_window`."""


class _ConfigReader:
    """Typed access to a config; every failure is a `SpecError` that names the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def family(self) -> str:
        architectures = self._config.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise SpecError(f"architectures must name one class, it is {architectures!r}")
        family = FAMILIES.get(architectures[0]) if isinstance(architectures[0], str) else None
        if family is None:
            raise SpecError(
                f"architectures: {architectures[0]!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        return family

    def refuse_unsupported(self) -> None:
        if self._config.get("quantization_config") is not None:
            try:
                bnb.check_config(self._config["quantization_config"])
            except bnb.BnbError as error:
                raise SpecError(f"quantization_config: {error}") from error
        for key in ("qk_layernorm", "use_bidirectional_attention"):
            if self._config.get(key):
                raise SpecError(f"{key}: {self._config[key]!r} is not supported")

    def activation(self, family: str) -> str:
        key = "hidden_activation" if self._config.get("hidden_activation") is not None else "hidden_act"
        value = self._config.get(key)
        if value is None:
            value = "gelu_new" if family == "phi" else "gelu_pytorch_tanh" if "gemma" in family else "silu"
        if value in ("silu", "swish"):
            return "silu"
        # Gemma's first configs say "gelu" and mean the approximation by tanh, as transformers takes it too.
        if value in ("gelu_new", "gelu_pytorch_tanh") or (value == "gelu" and family == "gemma"):
            return "gelu_tanh"
        raise SpecError(f"{key}: only silu and the tanh form of gelu are supported, it is {value!r}")

    def rotary_dim(self, family: str, head_dim: int) -> int:
        rope = self._rope_parameters()
        part = rope.get("partial_rotary_factor", self._config.get("partial_rotary_factor"))
        part = (0.5 if family == "phi" else 1.0) if part is None else _positive("partial_rotary_factor", part)
        dim = int(head_dim * part)
        if part > 1 or dim < 2 or dim % 2:
            raise SpecError(f"partial_rotary_factor: {part} of a head of {head_dim} cannot be rotated")
        return dim

    def softcap(self, key: str, family: str) -> float | None:
        value = self._config.get(key)
        return None if value is None or family != "gemma2" else _positive(key, value)

    def local_rope_theta(self) -> float:
        local = self._config.get("rope_parameters")
        local = local.get("sliding_attention") if isinstance(local, Mapping) else None
        if isinstance(local, Mapping) and local.get("rope_theta") is not None:
            return _positive("rope_theta", local["rope_theta"])
        return self.number("rope_local_base_freq", 10_000.0)

    def _rope_parameters(self) -> Mapping[str, Any]:
        """Of the layers without a window, where the two differ."""
        scaling = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if isinstance(scaling, Mapping) and isinstance(scaling.get("full_attention"), Mapping):
            scaling = scaling["full_attention"]
        if not isinstance(scaling, Mapping):
            raise SpecError(f"rope_scaling must be an object, it is {scaling!r}")
        return scaling

    def size(self, key: str, default: int | None = None, most: int = 2**31) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise SpecError(f"{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{key} must be a positive integer, it is {value!r}")
        if value > most:
            raise SpecError(f"{key} is larger than {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key)
        return default if value is None else _positive(key, value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise SpecError(f"{key} must be true or false, it is {value!r}")
        return default if value is None else value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """The ids under `key`: a number, a list of numbers, or nothing."""
        return token_ids(self._config, key)

    def rope(self) -> tuple[float, RopeScaling | None]:
        """Base of the rotary frequencies, and their scaling."""
        config, scaling = self._config, self._rope_parameters()
        theta = scaling.get("rope_theta", config.get("rope_theta"))
        default = 1_000_000.0 if config.get("architectures") == ["Gemma3ForCausalLM"] else 10_000.0
        theta = default if theta is None else _positive("rope_theta", theta)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind not in ("linear", "llama3"):
            raise SpecError(
                f"rope_scaling: type {kind!r} is not supported; supported: default, linear, llama3"
            )

        def part(key: str) -> float:
            return _positive(f"rope_scaling.{key}", scaling.get(key))

        if kind == "linear":
            return theta, RopeScaling(kind, part("factor"), 1.0, 1.0, self.size("max_position_embeddings"))
        low, high = part("low_freq_factor"), part("high_freq_factor")
        if high <= low:
            raise SpecError(f"rope_scaling: high_freq_factor ({high}) must exceed low_freq_factor ({low})")
        original = part("original_max_position_embeddings")
        return theta, RopeScaling(kind, part("factor"), low, high, int(min(original, 2**31)))

    def windows(self, family: str, num_layers: int) -> tuple[int | None, ...]:
        """The window of every layer, as transformers takes it from old and new configs."""
        config = self._config
        if family in ("llama", "phi", "gemma") or config.get("sliding_window", _DEFAULT_WINDOW) is None:
            return (None,) * num_layers
        if family in ("qwen2", "qwen3") and not self.flag("use_sliding_window", False):
            return (None,) * num_layers
        window = self.size("sliding_window", _DEFAULT_WINDOW)
        layer_types = config.get("layer_types")
        if isinstance(layer_types, list):
            if len(layer_types) < num_layers:
                raise SpecError(f"layer_types names {len(layer_types)} layers of {num_layers}")
            windowed = [kind == "sliding_attention" for kind in layer_types[:num_layers]]
        elif family in ("qwen2", "qwen3"):
            first = config.get("max_window_layers")
            if not isinstance(first, int) or isinstance(first, bool):
                raise SpecError(f"max_window_layers must be an integer, it is {first!r}")
            windowed = [layer >= first for layer in range(num_layers)]
        elif family == "gemma2":
            windowed = [layer % 2 == 0 for layer in range(num_layers)]
        elif family == "gemma3":
            every = self.size("sliding_window_pattern", 6)
            windowed = [(layer + 1) % every != 0 for layer in range(num_layers)]
        else:
            windowed = [True] * num_layers
        return tuple(window if each else None for each in windowed)


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The token ids under `key`: a number, a list of numbers, or nothing. Raises `SpecError`."""
    value = config.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in values):
        raise SpecError(f"{key} must be a token id or a list of them, it is {value!r}")
    return tuple(values)


def _positive(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise SpecError(f"{key} must be a positive number, it is {value!r}")
    return float(value)
