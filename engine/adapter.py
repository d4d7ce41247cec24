"""Reads one LoRA adapter in PEFT's format from a directory. Knows no slots, and no tensor (`peft.py` does).

An adapter is data from somebody else: everything is checked before anything is used, and pickles are never opened.
"""

import hashlib
import re
from collections.abc import Hashable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.host_adapter import MAX_RANK, AdapterError, AdapterNotFoundError, HostAdapter
from engine.merge import merge_adapters
from engine.peft import largest_file, read_peft
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from engine.protocol import AdapterPart, AdapterRef
from engine.spec import ModelSpec

PICKLE_FILE = "adapter_model.bin"


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


def version_of(ref: AdapterRef) -> Hashable:
    """The same for a reference: of its parts, where it is a sum."""
    return tuple(version_of(part.ref) for part in ref.parts) or adapter_version(ref.uri)


def read_adapter(ref: AdapterRef, spec: ModelSpec) -> HostAdapter:
    """Read and check the adapter at `ref.uri`, or merge its parts, for a base of this spec. Raises `AdapterError`."""
    if ref.parts:
        return merge_adapters([(part.ref.name, _read_part(part, spec), part.weight) for part in ref.parts])
    *_, num_bytes = adapter_version(ref.uri)
    directory = _directory(ref.uri)
    config = PeftConfig(_contents(directory / CONFIG_FILE))
    _refuse_other_base(ref, config)
    if num_bytes > largest_file(spec):
        raise AdapterError(
            f"{WEIGHTS_FILE}: {num_bytes} bytes; no adapter of rank {MAX_RANK} for this base is as large"
        )
    weights = _contents(directory / WEIGHTS_FILE)
    sha256 = hashlib.sha256(weights).hexdigest()
    if ref.sha256 is not None and sha256 != ref.sha256.lower():
        raise AdapterError(f"{WEIGHTS_FILE}: its sha256 is {sha256}, the catalog says {ref.sha256}")
    return read_peft(config, weights, spec, ref.name.partition("/")[0])


def _read_part(part: AdapterPart, spec: ModelSpec) -> HostAdapter:
    try:
        return read_adapter(part.ref, spec)
    except AdapterError as error:
        raise type(error)(f"{part.ref.name}: {error}") from error


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path.name}: cannot be read: {error.strerror}") from error


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
