"""Reads one LoRA adapter in PEFT's format from a directory and checks it against the base. Knows no slots.

An adapter is data from somebody else: everything is checked before anything is used, pickles are never opened, and
what would silently change the output (DoRA, biases, replaced layers, other inits) is refused.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.protocol import AdapterRef
from engine.spec import LINEAR_BLOCKS, ModelSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_RANK = 1024


class AdapterError(Exception):
    """The adapter cannot be used; the message names the file and the cause, and is fit for the caller."""


class AdapterNotFoundError(AdapterError):
    """There is no adapter at this address."""


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapted projection: y += scaling * B A x."""

    a: Tensor
    """[rank, inputs], in the dtype it was stored in."""
    b: Tensor
    """[outputs, rank]"""
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; not folded into the weights."""


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """A checked adapter in host memory."""

    digest: str
    """sha256 over scalings and weights: the same digest gives the same tokens."""
    modules: dict[tuple[int, str], LoraWeights]
    """By (layer, projection), e.g. (0, "q_proj")."""
    num_bytes: int
    rank: int
    """The largest of its modules' ranks."""


def adapter_version(uri: str) -> tuple[int, int, int, int]:
    """(mtime_ns, size) of both files: changes when the directory is published anew. Reads no contents.

    Raises `AdapterNotFoundError` when nothing is there, `AdapterError` when it is incomplete or a pickle.
    """
    directory = _directory(uri)
    try:
        config, weights = (directory / CONFIG_FILE).stat(), (directory / WEIGHTS_FILE).stat()
    except (OSError, ValueError) as error:
        raise _why_absent(directory, uri) from error
    return config.st_mtime_ns, config.st_size, weights.st_mtime_ns, weights.st_size


def read_adapter(ref: AdapterRef, spec: ModelSpec) -> HostAdapter:
    """Read and check the adapter at `ref.uri` for a base of this spec. Raises `AdapterError`."""
    *_, num_bytes = adapter_version(ref.uri)
    directory = _directory(ref.uri)
    config = _Config(directory / CONFIG_FILE)
    config.refuse_unsupported()
    _refuse_other_base(ref, config)
    path = directory / WEIGHTS_FILE
    most = sum(sum(spec.linear_shape(module)) for module in LINEAR_BLOCKS) * spec.num_layers * MAX_RANK * 4
    if num_bytes > most:
        raise AdapterError(
            f"{path}: {num_bytes} bytes; no adapter of rank {MAX_RANK} for this base is as large"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if ref.sha256 is not None and sha256 != ref.sha256.lower():
        raise AdapterError(f"{path}: its sha256 is {sha256}, the catalog says {ref.sha256}")
    pairs = _pairs(_tensors(data, path), path)
    config.check_targets(set(pairs), spec.num_layers)
    served = ref.name.partition("/")[0]
    bases = f"the adapter's config names the base {config.base!r}, served is {served!r}"
    modules: dict[tuple[int, str], LoraWeights] = {}
    for (layer, module), halves in sorted(pairs.items()):
        modules[layer, module] = _checked_module(layer, module, halves, config, spec, path, bases)
    canonical = json.dumps([[layer, module, w.scaling] for (layer, module), w in modules.items()])
    return HostAdapter(
        digest=hashlib.sha256(f"{canonical} {sha256}".encode()).hexdigest(),
        modules=modules,
        num_bytes=sum(t.numel() * t.element_size() for w in modules.values() for t in (w.a, w.b)),
        rank=max(w.a.shape[0] for w in modules.values()),
    )


def _directory(uri: str) -> Path:
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise AdapterError(f"{uri}: only local directories (a path or file://) are supported")
    return Path(unquote(parts.path))


def _why_absent(directory: Path, uri: str) -> AdapterError:
    try:
        present = {path.name for path in directory.iterdir()}
    except (OSError, ValueError):
        return AdapterNotFoundError(f"no adapter directory at {uri!r}")
    if WEIGHTS_FILE not in present and PICKLE_FILE in present:
        return AdapterError(
            f"{directory / PICKLE_FILE}: a pickle, which is never read; save it as {WEIGHTS_FILE}"
        )
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in present]
    if len(missing) == 2:
        return AdapterNotFoundError(f"no adapter in {uri!r}: it has neither {CONFIG_FILE} nor {WEIGHTS_FILE}")
    return AdapterError(f"{directory}: {', '.join(missing) or 'a file'} is missing or cannot be read")


class _Config:
    """adapter_config.json, with the meaning PEFT gives to its keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path}: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise AdapterError(f"{path}: not a JSON object")
        self._values: dict[str, Any] = document
        base = document.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else ""

    def refuse_unsupported(self) -> None:
        values = self._values
        if values.get("peft_type") != "LORA":
            raise self._error(f"peft_type is {values.get('peft_type')!r}; only LORA is supported")
        if values.get("bias", "none") != "none":
            raise self._error(f"bias is {values['bias']!r}; trained biases are not supported")
        for key in _MUST_BE_OFF:
            if values.get(key):
                raise self._error(f"{key} is {values[key]!r}, which is not supported")
        for key, value in values.items():
            if key.startswith("use_") and value and key != "use_rslora":
                raise self._error(f"{key} is {value!r}, which is not supported")
        init = values.get("init_lora_weights", True)
        if init not in (True, False, None, "gaussian", "eva", "orthogonal"):
            raise self._error(
                f"init_lora_weights is {init!r}, which changes the base's weights; convert to plain LoRA"
            )
        targets = values.get("target_modules")
        if not isinstance(targets, str) and not (
            targets and isinstance(targets, list) and _all_strings(targets)
        ):
            raise self._error(f"target_modules must be a name or a list of names, it is {targets!r}")
        for name in [targets] if isinstance(targets, str) else targets:
            if name.split(".")[-1] in ("lm_head", "embed_tokens"):
                raise self._error(f"target_modules: an adapter on {name} is not supported yet")
        if not isinstance(values.get("use_rslora", False), bool | None):
            raise self._error(f"use_rslora must be true or false, it is {values['use_rslora']!r}")
        layers = values.get("layers_to_transform")
        if layers is not None and not isinstance(layers, int | list):
            raise self._error(f"layers_to_transform must be a list of layers, it is {layers!r}")
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

    def check_targets(self, found: set[tuple[int, str]], num_layers: int) -> None:
        """Hold the tensors against target_modules, where that is a list (a pattern is for training only)."""
        values = self._values
        targets, excluded = values["target_modules"], values.get("exclude_modules")
        if targets == "all-linear":
            targets = list(LINEAR_BLOCKS)
        if isinstance(targets, str) or excluded:
            return
        layers = values.get("layers_to_transform")
        expected_layers = (
            range(num_layers) if layers is None else [layers] if isinstance(layers, int) else layers
        )
        for layer, module in sorted(found):
            if not any(f".{module_path(layer, module)}".endswith(f".{target}") for target in targets):
                raise self._error(f"target_modules does not name {module}, but {WEIGHTS_FILE} adapts it")
        for target in sorted(targets):
            expected = [
                (layer, module)
                for layer in expected_layers
                for module in LINEAR_BLOCKS
                if f".{module_path(layer, module)}".endswith(f".{target}")
            ]
            if not expected:
                raise self._error(f"target_modules names {target!r}, which this base does not have")
            absent = [key for key in expected if key not in found]
            if absent:
                raise self._error(
                    f"target_modules names {target!r}, but {WEIGHTS_FILE} has nothing for {len(absent)} of the base's "
                    f"{len(expected)}, first {module_path(*absent[0])}; the adapter's config names the base {self.base!r}"
                )

    def rank(self, path: str) -> int:
        return self._by_pattern("rank_pattern", path, self._values["r"])

    def scaling(self, path: str) -> float:
        alpha, rank = self._by_pattern("alpha_pattern", path, self._values["lora_alpha"]), self.rank(path)
        return alpha / math.sqrt(rank) if self._values.get("use_rslora") else alpha / rank

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
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _MAX_ALPHA:
            raise self._error(f"{key} must be a number up to {_MAX_ALPHA}, it is {value!r}")

    def _error(self, message: str) -> AdapterError:
        return AdapterError(f"{self._path}: {message}")


_MAX_ALPHA = 1_000_000
_MUST_BE_OFF = (
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Keys of adapter_config.json that change what the adapter computes, when set."""


def module_path(layer: int, module: str) -> str:
    """As transformers names it: model.layers.0.self_attn.q_proj."""
    return f"model.layers.{layer}.{LINEAR_BLOCKS.get(module, '?')}.{module}"


_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,6})\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise AdapterError(f"{path}: a pickle, not safetensors; pickles are never read") from error
        raise AdapterError(f"{path}: not a whole safetensors file (cut off or damaged): {error}") from error


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[tuple[int, str], dict[str, Tensor]]:
    """A and B of every adapted projection."""
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or LINEAR_BLOCKS.get(match[3]) != match[2]:
            if "lm_head" in name or "embed" in name:
                raise AdapterError(f"{path}: {name}: adapting embeddings or the head is not supported yet")
            raise AdapterError(f"{path}: {name} is not a LoRA weight of a projection of this base")
        pairs.setdefault((int(match[1]), match[3]), {})[match[4]] = tensor
    if not pairs:
        raise AdapterError(f"{path}: holds no weights")
    for (layer, module), halves in pairs.items():
        if len(halves) == 1:
            lone, partner = ("A", "B") if "A" in halves else ("B", "A")
            raise AdapterError(f"{path}: {module_path(layer, module)} has lora_{lone} but no lora_{partner}")
    return pairs


def _checked_module(
    layer: int,
    module: str,
    halves: Mapping[str, Tensor],
    config: _Config,
    spec: ModelSpec,
    path: Path,
    bases: str,
) -> LoraWeights:
    name = module_path(layer, module)
    if layer >= spec.num_layers:
        raise AdapterError(f"{path}: {name}: this base has {spec.num_layers} layers; {bases}")
    rank = config.rank(name)
    outputs, inputs = spec.linear_shape(module)
    for half, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
        tensor = halves[half]
        if tuple(tensor.shape) != expected:
            raise AdapterError(
                f"{path}: {name}.lora_{half} has shape {list(tensor.shape)}, expected {list(expected)} "
                f"(rank {rank} by {CONFIG_FILE}); {bases}"
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"{path}: {name}.lora_{half} is {tensor.dtype}, not a float of 16 or 32 bits")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name}.lora_{half} holds NaN or infinite values")
    return LoraWeights(a=halves["A"], b=halves["B"], scaling=config.scaling(name))


_KNOWN_FAMILY = re.compile(
    r"(?<![a-z])(smollm|tinyllama|llama|mistral|mixtral|zephyr|qwen|gemma|phi|falcon|olmo|granite|deepseek|gpt)"
    r"(?:[-_]?(\d+)(?:\.\d+)?(?![\d.]*[bm]))?"
)
"""A family and, unless the number is a size (7b, 135m), its version."""


def _refuse_other_base(ref: AdapterRef, config: _Config) -> None:
    """Two bases can share every shape (SmolLM and SmolLM2 do), so names count, where both are well known."""
    served = ref.name.partition("/")[0]
    trained = _families(config.base.rstrip("/").split("/")[-1])
    wanted = _families(served)
    if not trained or not wanted:
        return
    # On the hub, a name without a version is version one; elsewhere it may be short for anything.
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.base)
    shared = trained.keys() & wanted.keys()
    other_version = any(
        wanted[name] and trained[name] != wanted[name] for name in shared if trained[name] or hub_id
    )
    if not shared or other_version:
        raise AdapterError(
            f"{CONFIG_FILE} of {ref.name!r} names another base: {config.base!r}, but the model served is {served!r}"
        )


def _families(name: str) -> dict[str, str | None]:
    return {match[1]: match[2] for match in _KNOWN_FAMILY.finditer(name.lower())}


def _all_strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
