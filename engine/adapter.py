"""Reads one LoRA adapter in PEFT's format. Knows no slots, no sources (`sources.py` does) and no tensors (`peft.py`).

An adapter is data from somebody else: everything is checked before anything is used, and pickles are never opened.
"""

import hashlib
import re

from engine.host_adapter import AdapterError, HostAdapter
from engine.merge import merge_adapters
from engine.peft import read_peft
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from engine.protocol import AdapterPart, AdapterRef
from engine.sources import Sources
from engine.spec import ModelSpec


def read_adapter(ref: AdapterRef, spec: ModelSpec, sources: Sources) -> HostAdapter:
    """Fetch and check the adapter at `ref.uri`, or merge its parts, for a base of this spec. Raises `AdapterError`."""
    if ref.parts:
        parts = [(part.ref.name, _read_part(part, spec, sources), part.weight) for part in ref.parts]
        return merge_adapters(parts)
    files = sources.read(ref.uri)
    config, weights = PeftConfig(files[CONFIG_FILE]), files[WEIGHTS_FILE]
    _refuse_other_base(ref, config)
    sha256 = hashlib.sha256(weights).hexdigest()
    if ref.sha256 is not None and sha256 != ref.sha256.lower():
        raise AdapterError(f"{WEIGHTS_FILE}: its sha256 is {sha256}, the catalog says {ref.sha256}")
    return read_peft(config, weights, sha256, spec, ref.name.partition("/")[0])


def _read_part(part: AdapterPart, spec: ModelSpec, sources: Sources) -> HostAdapter:
    try:
        return read_adapter(part.ref, spec, sources)
    except AdapterError as error:
        raise type(error)(f"{part.ref.name}: {error}") from error


_KNOWN_FAMILY = re.compile(
    r"(?<![a-z])(smollm|tinyllama|llama|mistral|mixtral|zephyr|qwen|gemma|phi|falcon|olmo|granite|deepseek|gpt)"
    r"(?:[-_]?(\d+)(?:\.\d+)?(?![\d.]*[bm]))?"
)
"""A family and, unless the number is a size (7b, 135m), its version."""


def _refuse_other_base(ref: AdapterRef, config: PeftConfig) -> None:
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
