"""What a decoder is, read from a Hugging Face `config.json`. Knows no weights and no files."""

from collections.abc import Mapping
from typing import Any

import msgspec

from engine import bnb
from engine.families import FAMILIES, Family


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
    """One decoder: what its family and its config say, in the form the decoder reads."""

    family: Family
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
    local_rope_theta: float | None
    """Rotary base of the layers with a window, without scaling; None: as in the others."""
    rotary_dim: int
    """How much of a head is rotated, from its beginning."""
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    """Per layer, how many keys a query sees at most, itself included."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    activation: str
    """"silu" or "gelu_tanh"."""
    attention_scale: float
    """What scores are multiplied with."""
    attention_softcap: float | None
    """Scores s become cap * tanh(s / cap)."""
    logits_softcap: float | None
    embedding_scale: float

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Read `config.json` as transformers 4 or 5 writes it. Raises `SpecError`."""
        reader = _ConfigReader(config)
        family = reader.family
        reader.refuse_unsupported()
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        num_kv_heads = reader.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise SpecError(
                f"num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads})"
            )
        if reader.value("head_dim") is None and hidden_size % num_heads:
            raise SpecError(
                f"hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_heads})"
            )
        head_dim = reader.size("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise SpecError(f"head_dim must be even, it is {head_dim}")
        num_layers = reader.size("num_hidden_layers", most=_MOST_LAYERS)
        rope_theta, rope_scaling = reader.rope()
        attention_bias = family.biased or reader.own_flag("attention_bias")
        return cls(
            family=family,
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=reader.number(family.norm_eps_key, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            local_rope_theta=reader.local_rope_theta(),
            rotary_dim=reader.rotary_dim(head_dim),
            max_position_embeddings=reader.size("max_position_embeddings"),
            windows=reader.windows(num_layers),
            qkv_bias=attention_bias or family.qkv_bias,
            o_bias=attention_bias,
            mlp_bias=family.biased or reader.own_flag("mlp_bias"),
            tie_word_embeddings=reader.flag("tie_word_embeddings", False),
            eos_token_ids=reader.token_ids("eos_token_id"),
            bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
            activation=reader.activation(),
            attention_scale=(reader.own_number("query_pre_attn_scalar") or head_dim) ** -0.5,
            attention_softcap=reader.own_number("attn_logit_softcapping"),
            logits_softcap=reader.own_number("final_logit_softcapping"),
            embedding_scale=hidden_size**0.5 if family.scaled_embedding else 1.0,
        )

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies the activation with a second projection."""
        return len(self.family.groups["gate_up"]) == 2

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of a projection, e.g. "q_proj". Raises `KeyError` for another name."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        match self.group_of(module):
            case "qkv":
                return (queries if module == "q_proj" else keys), self.hidden_size
            case "o":
                return self.hidden_size, queries
            case "gate_up":
                return self.intermediate_size, self.hidden_size
            case _:
                return self.hidden_size, self.intermediate_size

    def group_of(self, module: str) -> str:
        """The fused projection a module is part of. Raises `KeyError` for a name this model does not have."""
        for group, members in self.family.groups.items():
            if module in members:
                return group
        raise KeyError(module)

    def has_bias(self, module: str) -> bool:
        match self.group_of(module):
            case "qkv":
                return self.qkv_bias
            case "o":
                return self.o_bias
            case _:
                return self.mlp_bias

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model under its Hugging Face name, with its shape."""
        family = self.family
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }

        def add_norm(name: str) -> None:
            shapes[f"{name}.weight"] = (self.hidden_size,)
            if family.layer_norm:
                shapes[f"{name}.bias"] = (self.hidden_size,)

        add_norm(family.final_norm)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        if family.biased:
            shapes["lm_head.bias"] = (self.vocab_size,)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for norm in family.layer_norms.values():
                add_norm(f"{prefix}.{norm}")
            if family.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
            for module, block in family.modules.items():
                shape = self.linear_shape(module)
                shapes[f"{prefix}.{block}.{module}.weight"] = shape
                if self.has_bias(module):
                    shapes[f"{prefix}.{block}.{module}.bias"] = shape[:1]
        return shapes


_MOST_LAYERS = 4096


class _ConfigReader:
    """Typed access to a config; every failure is a `SpecError` that names the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.family = _family(config)
        self._config = {**self.family.keys, **config}

    def refuse_unsupported(self) -> None:
        if self._config.get("quantization_config") is not None:
            try:
                bnb.check_config(self._config["quantization_config"])
            except bnb.BnbError as error:
                raise SpecError(f"quantization_config: {error}") from error
        for key in ("qk_layernorm", "use_bidirectional_attention"):
            if self._config.get(key):
                raise SpecError(f"{key}: {self._config[key]!r} is not supported")

    def activation(self) -> str:
        served, key = self.family.activations, self.family.activation_key
        value = self.value(key) or next(iter(served))
        if not isinstance(value, str) or value not in served:
            raise SpecError(f"{key}: only {' and '.join(served)} are supported, it is {value!r}")
        return served[value]

    def rotary_dim(self, head_dim: int) -> int:
        part = self._rope_parameters().get("partial_rotary_factor", self.value("partial_rotary_factor"))
        part = 1.0 if part is None else _positive("partial_rotary_factor", part)
        dim = int(head_dim * part)
        if part > 1 or dim < 2 or dim % 2:
            raise SpecError(f"partial_rotary_factor: {part} of a head of {head_dim} cannot be rotated")
        return dim

    def local_rope_theta(self) -> float | None:
        local = self.value("rope_parameters")
        local = local.get("sliding_attention") if isinstance(local, Mapping) else None
        if isinstance(local, Mapping) and local.get("rope_theta") is not None:
            return _positive("rope_theta", local["rope_theta"])
        return self.own_number("rope_local_base_freq")

    def _rope_parameters(self) -> Mapping[str, Any]:
        """Of the layers without a window, where the two differ."""
        scaling = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if isinstance(scaling, Mapping) and isinstance(scaling.get("full_attention"), Mapping):
            scaling = scaling["full_attention"]
        if not isinstance(scaling, Mapping):
            raise SpecError(f"rope_scaling must be an object, it is {scaling!r}")
        return scaling

    def value(self, key: str) -> Any:
        """What the config says, or else what the family's configs mean by saying nothing."""
        return self._config.get(key)

    def own_number(self, key: str) -> float | None:
        """A key that only some families have."""
        value = self.value(key) if key in self.family.keys else None
        return None if value is None else _positive(key, value)

    def own_flag(self, key: str) -> bool:
        return key in self.family.keys and self.flag(key, False)

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
        theta = 10_000.0 if theta is None else _positive("rope_theta", theta)
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

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """The window of every layer, as transformers takes it from old and new configs."""
        keys = self.family.keys
        unused = "use_sliding_window" in keys and not self.flag("use_sliding_window", False)
        if "sliding_window" not in keys or self.value("sliding_window") is None or unused:
            return (None,) * num_layers
        window = self.size("sliding_window")
        if "layer_types" in keys and self.value("layer_types") is not None:
            windowed = self._windowed(self.value("layer_types"), num_layers)
        elif "max_window_layers" in keys:
            first = self.value("max_window_layers")
            if not isinstance(first, int) or isinstance(first, bool):
                raise SpecError(f"max_window_layers must be an integer, it is {first!r}")
            windowed = [layer >= first for layer in range(num_layers)]
        elif "sliding_window_pattern" in keys:
            every = self.size("sliding_window_pattern")
            windowed = [(layer + 1) % every != 0 for layer in range(num_layers)]
        else:
            windowed = [True] * num_layers
        return tuple(window if each else None for each in windowed)

    def _windowed(self, layer_types: object, num_layers: int) -> list[bool]:
        if not isinstance(layer_types, list) or len(layer_types) < num_layers:
            raise SpecError(f"layer_types must name the kind of {num_layers} layers, it is {layer_types!r}")
        for kind in layer_types:
            if kind not in ("sliding_attention", "full_attention"):
                raise SpecError(f"layer_types: {kind!r} is not supported")
        return [kind == "sliding_attention" for kind in layer_types[:num_layers]]


def _family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise SpecError(f"architectures must name one class, it is {architectures!r}")
    family = FAMILIES.get(architectures[0]) if isinstance(architectures[0], str) else None
    if family is None:
        raise SpecError(
            f"architectures: {architectures[0]!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return family


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
