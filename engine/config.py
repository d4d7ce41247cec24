"""`EngineConfig`: the `[engine]` table of the TOML file. Knows no model."""

from pathlib import Path
from typing import Literal

import msgspec


class ConfigError(Exception):
    """The configuration cannot be used; the message names the file, the key and what to change."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an engine must be told. README.md documents every key."""

    model: str
    """`package:NAME` (a GGUF inside an installed package), `hf://org/name@revision` (from the Hugging Face hub), a
    .gguf file, or a Hugging Face directory."""
    name: str
    """The model's public name."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none"
    """How the weights of the projections are held, and with int8 that of the head; fp8 needs a CUDA device."""
    host: str = "127.0.0.1"
    port: int = 8100
    max_model_len: int = 2048
    """Prompt plus output tokens of one request; capped by the model's own limit."""
    kv_cache_mib: int = 512
    max_batch_tokens: int = 512
    """Token budget of one step: decodes first, the rest for chunks of prompts."""
    max_sequences: int = 64
    """Sequences that run at once."""
    max_waiting: int = 1024
    """Requests that may wait; one more is refused as overloaded."""
    max_waiting_tokens: int = 1_000_000
    """Prompt tokens that may wait, likewise; a lone request is never refused for its size."""
    speculative_tokens: int = 0
    """Tokens guessed by prompt lookup and checked in one step; 0 for none. Never changes an answer."""
    speculative_ngram: int = 3
    """Tokens in a row that must have come before to guess what follows."""
    adapter_slots: int = 64
    """Adapters that can be resident at once."""
    adapter_device_mib: int = 512
    adapter_host_mib: int = 1024
    adapter_pinned: tuple[str, ...] = ()
    """URIs of adapters that are loaded at start and stay on the device."""
    adapter_sources: tuple[str, ...] = ("file://",)
    """Where adapters may come from, as beginnings of URIs; `file://` is every local directory."""
    adapter_allow_private: bool = False
    """Whether web sources may lie at private, loopback or link-local addresses."""
    adapter_disk_dir: str = ""
    """Where remote adapters are kept; empty for a directory in the user's cache."""
    adapter_disk_mib: int = 4096
    adapter_recheck_s: float = 60.0
    """How long a remote adapter is taken for unchanged."""
    adapter_loaders: int = 4
    """Adapters that are fetched at the same time."""
    prefix_caching: bool = True
    kernels: Literal["auto", "native", "torch"] = "auto"
    batch_invariant: bool = False
    """Refuse to start with kernels whose results for a sequence depend on its company in the batch."""
    threads: int = 0
    """Compute threads; 0 for one per core."""


def load_config(path: str | Path) -> EngineConfig:
    """Read the `[engine]` table of a TOML file; a relative model path is relative to that file.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or out of range.
    """
    path = Path(path)
    try:
        document = msgspec.toml.decode(path.read_bytes())
        if "engine" not in document:
            raise ConfigError(f"{path}: there is no [engine] table.")
        config = msgspec.convert(document["engine"], EngineConfig)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{path}: [engine]: {error}") from error
    check_config(config, str(path))
    if not config.model.startswith(("package:", "hf://")):
        config = msgspec.structs.replace(config, model=str(path.absolute().parent / config.model))
    root = path.absolute().parent
    sources, pinned = (
        tuple(each if "://" in each else str(root / each) for each in uris)
        for uris in (config.adapter_sources, config.adapter_pinned)
    )
    disk = config.adapter_disk_dir and str(root / Path(config.adapter_disk_dir).expanduser())
    return msgspec.structs.replace(
        config, adapter_sources=sources, adapter_pinned=pinned, adapter_disk_dir=disk
    )


def check_config(config: EngineConfig, source: str) -> None:
    """Raises `ConfigError` for a value out of range."""
    lowest = {
        "port": 0,
        "threads": 0,
        "max_model_len": 2,
        "kv_cache_mib": 1,
        "max_batch_tokens": 1,
        "max_sequences": 1,
        "max_waiting": 1,
        "max_waiting_tokens": 1,
        "speculative_tokens": 0,
        "speculative_ngram": 1,
        "adapter_slots": 1,
        "adapter_device_mib": 1,
        "adapter_host_mib": 1,
        "adapter_disk_mib": 0,
        "adapter_recheck_s": 0,
        "adapter_loaders": 1,
    }
    for key, low in lowest.items():
        if getattr(config, key) < low:
            raise ConfigError(
                f"{source}: [engine]: {key}: must be at least {low}, not {getattr(config, key)}."
            )
    if config.quantization == "fp8":
        raise ConfigError(
            f'{source}: [engine]: quantization: "fp8" needs a CUDA device, and this engine computes on the CPU: '
            'choose "int8" or "nf4".'
        )
    if len(config.adapter_pinned) >= config.adapter_slots:
        raise ConfigError(
            f"{source}: [engine]: adapter_pinned: {len(config.adapter_pinned)} adapters leave none of the "
            f"{config.adapter_slots} adapter_slots to others: raise adapter_slots."
        )
    if config.port > 65535:
        raise ConfigError(f"{source}: [engine]: port: must be at most 65535, not {config.port}.")
    if config.max_sequences > config.max_batch_tokens:
        raise ConfigError(
            f"{source}: [engine]: max_sequences ({config.max_sequences}) cannot exceed max_batch_tokens "
            f"({config.max_batch_tokens}): every running sequence needs a token of each step."
        )
