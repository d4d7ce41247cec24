"""What a decoder is, read from a Hugging Face `config.json`. Knows no weights and no files."""

from collections.abc import Mapping
from typing import Any

import msgspec


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


class ModelSpec(msgspec.Struct, frozen=True):
    """One decoder of the Llama family: pre-norm (RMS), rotary, grouped queries, gated SiLU."""

    family: str
    """"llama", "mistral" or "qwen2"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None
    """How many keys a query sees at most, itself included, in every layer."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Read `config.json` as transformers 4 or 5 writes it. Raises `SpecError`."""
        reader = _ConfigReader(config)
        family = reader.family()
        reader.refuse_unsupported()
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        default_kv_heads = num_heads if family == "llama" else None
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
        biased = family == "llama" and reader.flag("attention_bias", False)
        return cls(
            family=family,
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=reader.size("max_position_embeddings"),
            sliding_window=reader.sliding_window(family, num_layers),
            qkv_bias=biased or family == "qwen2",
            o_bias=biased,
            mlp_bias=family == "llama" and reader.flag("mlp_bias", False),
            tie_word_embeddings=reader.flag("tie_word_embeddings", False),
            eos_token_ids=reader.token_ids("eos_token_id"),
            bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        )

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of a projection, e.g. "q_proj". Raises `KeyError` for another name."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[module]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model under its Hugging Face name, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (self.hidden_size,)
            for module, block in LINEAR_BLOCKS.items():
                shape = self.linear_shape(module)
                shapes[f"{prefix}.{block}.{module}.weight"] = shape
                if self.has_bias(module):
                    shapes[f"{prefix}.{block}.{module}.bias"] = shape[:1]
        return shapes

    def has_bias(self, module: str) -> bool:
        if module in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if module == "o_proj" else self.mlp_bias


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

_FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
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
        family = _FAMILIES.get(architectures[0]) if isinstance(architectures[0], str) else None
        if family is None:
            raise SpecError(
                f"architectures: {architectures[0]!r} is not supported; supported: {', '.join(_FAMILIES)}"
            )
        return family

    def refuse_unsupported(self) -> None:
        if self._config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise SpecError(f"hidden_act: only silu is supported, it is {self._config['hidden_act']!r}")
        if self._config.get("quantization_config") is not None:
            raise SpecError(
                "quantization_config: quantised safetensors are not supported; use the original or a GGUF"
            )
        if self._config.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise SpecError(
                f"partial_rotary_factor: {self._config['partial_rotary_factor']!r} is not supported"
            )

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
        config = self._config
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise SpecError(f"rope_scaling must be an object, it is {scaling!r}")
        theta = scaling.get("rope_theta", config.get("rope_theta"))
        theta = 10_000.0 if theta is None else _positive("rope_theta", theta)
        if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise SpecError(f"partial_rotary_factor: {scaling['partial_rotary_factor']!r} is not supported")
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

    def sliding_window(self, family: str, num_layers: int) -> int | None:
        """The window of every layer; a model that mixes windowed and full layers is refused."""
        config = self._config
        if family == "llama" or config.get("sliding_window", _DEFAULT_WINDOW) is None:
            return None
        if family == "qwen2" and not self.flag("use_sliding_window", False):
            return None
        window = self.size("sliding_window", _DEFAULT_WINDOW)
        layer_types = config.get("layer_types")
        if isinstance(layer_types, list):
            windowed = [kind == "sliding_attention" for kind in layer_types[:num_layers]]
        elif family == "qwen2":
            first = config.get("max_window_layers")
            if not isinstance(first, int) or isinstance(first, bool):
                raise SpecError(f"max_window_layers must be an integer, it is {first!r}")
            windowed = [layer >= first for layer in range(num_layers)]
        else:
            windowed = [True] * num_layers
        if any(windowed) and not all(windowed):
            raise SpecError(
                f"max_window_layers: a window in {sum(windowed)} of {num_layers} layers only is not supported"
            )
        return window if any(windowed) else None


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
