"""adapter_config.json, with the meaning PEFT gives to its keys; refuses what would silently change the output.

Knows no tensors, and of the base only the paths of its modules ("model.layers.0.self_attn.q_proj", "lm_head").
"""

import json
import math
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from engine.host_adapter import MAX_RANK, AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
MAX_ALPHA = 1_000_000


class PeftConfig:
    """What an adapter's configuration says. Raises `AdapterError` for anything that is not served."""

    def __init__(self, data: bytes) -> None:
        try:
            document = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{CONFIG_FILE}: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise AdapterError(f"{CONFIG_FILE}: not a JSON object")
        self._values: dict[str, Any] = document
        base = document.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else ""
        self._refuse_unsupported()
        self.bias: str = document.get("bias") or "none"
        """Whose biases were trained: "none", "all" or "lora_only"."""
        self.use_dora: bool = document.get("use_dora") or False
        self.lora_bias: bool = document.get("lora_bias") or False
        self.ties: bool = document.get("ensure_weight_tying") or False
        """Where the base's head is its embedding, what adapts one adapts the other."""

    def rank(self, path: str) -> int:
        return self._by_pattern("rank_pattern", path, self._values["r"])

    def scaling(self, path: str) -> float:
        alpha, rank = self._by_pattern("alpha_pattern", path, self._values["lora_alpha"]), self.rank(path)
        return alpha / math.sqrt(rank) if self._values.get("use_rslora") else alpha / rank

    def replaces(self, path: str) -> bool:
        """Whether modules_to_save names it."""
        return any(path.endswith(name) for name in self._values.get("modules_to_save") or [])

    def check_targets(self, found: Collection[str], linears: tuple[tuple[str, ...], ...], tied: bool) -> None:
        """Hold the adapted modules against target_modules, where that is a list (a pattern is for training only).

        Args:
            found: Paths of the modules that have LoRA weights.
            linears: Paths of every linear the base has, layer by layer.
            tied: Whether the base's head is its embedding.
        """
        values = self._values
        targets, excluded = values["target_modules"], values.get("exclude_modules")
        if targets == "all-linear":
            targets = [path for paths in linears for path in paths]
        if isinstance(targets, str) or excluded:
            return
        named = tuple(f".{target}" for target in targets)
        for path in found:
            if path in (EMBEDDING, HEAD) and self.ties and tied:
                continue  # PEFT adapts both, and names the embedding only
            if not f".{path}".endswith(named):
                name = path.split(".")[-1]
                raise self._error(f"target_modules does not name {name}, but {WEIGHTS_FILE} adapts it")
        layers = values.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        chosen = [paths for layer, paths in enumerate(linears) if layers is None or layer in layers]
        if layers is None:
            chosen.append((EMBEDDING, HEAD))
        every, expected = _by_ending((*linears, (EMBEDDING, HEAD))), _by_ending(tuple(chosen))
        for target in sorted(targets):
            if target not in every:
                raise self._error(f"target_modules names {target!r}, which this base does not have")
            wanted = expected.get(target, [])
            absent = [path for path in wanted if path not in found]
            if absent:
                raise self._error(
                    f"target_modules names {target!r}, but {WEIGHTS_FILE} has nothing for {len(absent)} of the base's "
                    f"{len(wanted)}, first {absent[0]}; the adapter's config names the base {self.base!r}"
                )

    def _refuse_unsupported(self) -> None:
        values = self._values
        if values.get("peft_type") != "LORA":
            raise self._error(f"peft_type is {values.get('peft_type')!r}; only LORA is supported")
        if values.get("bias") not in (None, "none", "all", "lora_only"):
            raise self._error(f'bias must be "none", "all" or "lora_only", it is {values["bias"]!r}')
        for key in _MUST_BE_OFF:
            if values.get(key):
                raise self._error(f"{key} is {values[key]!r}, which is not supported")
        for key, value in values.items():
            if key.startswith("use_") and value and key not in ("use_rslora", "use_dora"):
                raise self._error(f"{key} is {value!r}, which is not supported")
        for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            if not isinstance(values.get(key, False), bool | None):
                raise self._error(f"{key} must be true or false, it is {values[key]!r}")
        for other in ("lora_bias", "ensure_weight_tying"):
            if values.get("use_dora") and values.get(other):
                raise self._error(f"use_dora together with {other} is not supported")
        init = values.get("init_lora_weights", True)
        if init not in (True, False, None, "gaussian", "eva", "orthogonal"):
            raise self._error(
                f"init_lora_weights is {init!r}, which changes the base's weights; convert to plain LoRA"
            )
        targets = values.get("target_modules")
        if not isinstance(targets, str) and not (targets and _is_list_of_names(targets)):
            raise self._error(f"target_modules must be a name or a list of names, it is {targets!r}")
        replaced = values.get("modules_to_save") or []
        if not _is_list_of_names(replaced):
            raise self._error(f"modules_to_save must be a list of names, it is {replaced!r}")
        for name in replaced:
            if name not in ("lm_head", "embed_tokens", "model.embed_tokens"):
                raise self._error(
                    f"modules_to_save names {name!r}; only embed_tokens and lm_head can be replaced"
                )
        layers = values.get("layers_to_transform")
        if layers is not None and not isinstance(layers, int | list):
            raise self._error(f"layers_to_transform must be a list of layers, it is {layers!r}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        values = self._values
        self._integer("r", values.get("r"))
        self._number("lora_alpha", values.get("lora_alpha"))
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = values.get(key) or {}
            if not isinstance(patterns, dict):
                raise self._error(f"{key} must be an object, it is {patterns!r}")
            for pattern, value in patterns.items():
                self._check_pattern(key, pattern)
                check = self._integer if key == "rank_pattern" else self._number
                check(f"{key}.{pattern}", value)

    def _by_pattern(self, key: str, path: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that matches the end of the module's path."""
        for pattern, value in (self._values.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    def _check_pattern(self, key: str, pattern: str) -> None:
        """A repeated group can take for ever to match, and nobody needs one to name a module."""
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._error(f"{key}: {pattern!r} is no pattern: {error}") from error
        if len(pattern) > 200 or re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise self._error(f"{key}: the pattern {pattern[:200]!r} is too complex")

    def _integer(self, key: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
            raise self._error(f"{key} must be a whole number from 1 to {MAX_RANK}, it is {value!r}")

    def _number(self, key: str, value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_ALPHA:
            raise self._error(f"{key} must be a number up to {MAX_ALPHA}, it is {value!r}")

    def _error(self, message: str) -> AdapterError:
        return AdapterError(f"{CONFIG_FILE}: {message}")


_MUST_BE_OFF = (
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Keys of adapter_config.json that change what the adapter computes, when set."""


def _is_list_of_names(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


@lru_cache(maxsize=16)
def _by_ending(groups: tuple[tuple[str, ...], ...]) -> dict[str, list[str]]:
    """Every name that means a module by PEFT's rule (the path, or its end after a dot) -> the paths it means."""
    found: dict[str, list[str]] = {}
    for path in (path for group in groups for path in group):
        parts = path.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(path)
    return found
