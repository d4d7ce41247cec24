"""A base model on disk: its spec, weights by Hugging Face name, tokenizer files. Knows no kernels."""

import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine import bnb
from engine.gguf import GgufError, GgufFile
from engine.gguf_tokenizer import TokenizerError, tokenizer_files
from engine.hub import SCHEME, HubError, fetch_model
from engine.quant import Nf4Weight, Quantization
from engine.spec import ModelSpec, SpecError, token_ids


class CheckpointError(Exception):
    """The model cannot be loaded; the message names the file and the tensor or key."""


class Checkpoint(ABC):
    """A model that can be loaded, whatever its format. Tensors are read when asked for."""

    root: str
    """Where the model came from, as people should read it."""
    spec: ModelSpec
    config: dict[str, Any]
    """As in a Hugging Face `config.json`."""
    files: dict[str, bytes]
    """tokenizer.json, tokenizer_config.json (chat template and special tokens inside) and, if any,
    generation_config.json."""
    quantization: Quantization = "none"
    """"nf4" when projections are stored so."""
    digest: str
    """sha256 over config, files, names and shapes of the weights, and some bytes of each (not all: that takes
    minutes)."""

    def names(self) -> set[str]:
        """Every weight of the model, in Hugging Face's naming."""
        return set(self.spec.tensor_shapes())

    def served_as(self, wanted: Quantization) -> Quantization:
        """How the weights are held when `wanted` is configured: as they are stored, if that is quantised.

        Raises `CheckpointError` when they would have to be quantised a second time.
        """
        if self.quantization == "none":
            return wanted
        if wanted not in ("none", self.quantization):
            raise CheckpointError(
                f"{self.root}: the weights are stored as {self.quantization} and cannot be served with "
                f'quantization = "{wanted}"; leave it out'
            )
        return self.quantization

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight in `dtype`; it may be a view of the mapped file, so it is not to be written to.

        Raises `CheckpointError` when the file is damaged, `KeyError` for a name outside of `names()`.
        """

    @abstractmethod
    def release(self) -> None:
        """Give back the memory of the file's pages that were read; tensors that are still held stay valid."""

    def quantised(self, name: str) -> Nf4Weight | None:
        """The same weight as it is stored, when it is quantised as the engine computes with."""
        return None


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open "package:NAME" (the GGUF file inside that Python package), "hf://org/name@revision" (fetched from the
    Hugging Face hub into its cache), a .gguf file, or a Hugging Face directory.

    Checks that every weight is there in its shape, before any is read. Raises `CheckpointError`.
    """
    text = str(model)
    try:
        if text.startswith("package:"):
            name = text.removeprefix("package:")
            return _GgufCheckpoint(_packaged_gguf(name), root=text)
        if text.startswith(SCHEME):
            directory = fetch_model(text)
            return _SafetensorsCheckpoint(directory, root=f"{text.partition('@')[0]}@{directory.name}")
        path = Path(text).expanduser()
        if path.is_dir():
            return _SafetensorsCheckpoint(path, root=str(path))
        if path.is_file() and path.suffix == ".gguf":
            return _GgufCheckpoint(path, root=str(path))
    except (SpecError, TokenizerError) as error:
        raise CheckpointError(f"{text}: {error}") from error
    except (GgufError, HubError) as error:
        raise CheckpointError(str(error)) from error
    raise CheckpointError(
        f"{text}: neither a directory with config.json, nor a .gguf file, nor package:NAME, nor hf://org/name"
    )


class _GgufCheckpoint(Checkpoint):
    def __init__(self, path: Path, root: str) -> None:
        self.root = root
        self._file = GgufFile(path)
        self.files = tokenizer_files(self._file.metadata)
        self.config = self._file.config
        self.spec = _with_generation_eos(ModelSpec.from_hf_config(self.config), self.files)
        _check_shapes(self._file.shapes(), self.spec, lambda name: str(path))
        digest = hashlib.sha256()
        self._file.fingerprint(digest.update)
        self.digest = digest.hexdigest()

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._file.tensor(name, dtype)

    def release(self) -> None:
        self._file.release()


class _SafetensorsCheckpoint(Checkpoint):
    def __init__(self, directory: Path, root: str) -> None:
        self.root = root
        self.config = _read_json(directory / "config.json")
        self.files = _tokenizer_files(directory)
        self.spec = _with_generation_eos(ModelSpec.from_hf_config(self.config), self.files)
        self._paths = _tensor_paths(directory)
        self._open: dict[Path, Any] = {}
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.files):
            digest.update(name.encode() + self.files[name])
        shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(self._paths):
            if bnb.owner(name) not in self._paths:
                shapes[name] = tuple(self._slice(name).get_shape())
        for name in shapes:
            if f"{name}.{bnb.STATE}" in self._paths:
                self.quantization = "nf4"
                shapes[name] = self._stored_shape(name)
        _check_shapes(shapes, self.spec, lambda name: str(self._paths[name]))
        for name in sorted(self._paths):
            digest.update(f"{name} {shapes.get(name)}".encode() + self._first_row(name))
        self.digest = digest.hexdigest()

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self.quantised(name)
        if stored is not None:
            return stored.dense(dtype)
        tensor = self._read(name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self._paths[name]}: {name} is {tensor.dtype}; quantised weights are not supported"
            )
        return tensor.to(dtype)

    def quantised(self, name: str) -> Nf4Weight | None:
        if f"{name}.{bnb.STATE}" not in self._paths:
            return None
        parts = {part: self._read(f"{name}.{part}") for part in bnb.PARTS if f"{name}.{part}" in self._paths}
        try:
            return bnb.nf4_weight(self._read(name), parts)
        except bnb.BnbError as error:
            raise CheckpointError(f"{self._paths[name]}: {name}: {error}") from error

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(bnb.weight_state(self._read(f"{name}.{bnb.STATE}"))["shape"])
        except bnb.BnbError as error:
            raise CheckpointError(f"{self._paths[name]}: {name}: {error}") from error

    def _read(self, name: str) -> Tensor:
        if name not in self._paths:
            raise KeyError(name)
        try:
            return self._file(self._paths[name]).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._paths[name]}: {name}: {error}") from error

    def release(self) -> None:
        self._open.clear()  # what is closed is no longer mapped

    def _slice(self, name: str) -> Any:
        try:
            return self._file(self._paths[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._paths[name]}: {name}: {error}") from error

    def _first_row(self, name: str) -> bytes:
        weight = self._slice(name)
        first = weight[:1] if len(weight.get_shape()) > 1 else weight[:]
        return first.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def _packaged_gguf(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise CheckpointError(f"package:{package}: the package {package!r} is not installed") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise CheckpointError(f"package:{package}: the package holds {len(found)} .gguf files, not one")
    return found[0]


def _tensor_paths(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index_path, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index_path.is_file():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index_path}: weight_map does not name a file per tensor")
        for file in set(weight_map.values()):
            if Path(file).name != file:
                raise CheckpointError(f"{index_path}: {file!r} is not the name of a file beside it")
        return {name: directory / file for name, file in weight_map.items()}
    if not single.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never read" if pickled else ""
        raise CheckpointError(f"{directory}: no model.safetensors and no model.safetensors.index.json{hint}")
    return dict.fromkeys(_open_safetensors(single).keys(), single)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error


def _check_shapes(found: dict[str, tuple[int, ...]], spec: ModelSpec, file_of: Callable[[str], str]) -> None:
    expected = spec.tensor_shapes()
    for name, shape in expected.items():
        if name not in found:
            place = file_of(next(iter(found))) if found else "the checkpoint"
            raise CheckpointError(f"{name} is missing (beside {len(found)} other tensors in {place})")
        if found[name] != shape:
            raise CheckpointError(
                f"{file_of(name)}: {name} has shape {list(found[name])}, the config says {list(shape)}"
            )
    for name in found:
        if name not in expected and not (name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")):
            raise CheckpointError(
                f"{file_of(name)}: unexpected tensor {name}; the config does not account for it"
            )


def _tokenizer_files(directory: Path) -> dict[str, bytes]:
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: missing; a fast tokenizer is needed (save it with transformers)")
    _read_json(tokenizer)
    files = {"tokenizer.json": tokenizer.read_bytes()}
    config = _read_json(directory / "tokenizer_config.json", optional=True)
    for key, value in _read_json(directory / "special_tokens_map.json", optional=True).items():
        config.setdefault(key, value)
    template = directory / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = _read_text(template)
    elif "chat_template" not in config:
        config |= _read_json(directory / "chat_template.json", optional=True)
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=1).encode()
    generation = directory / "generation_config.json"
    if generation.is_file():
        files[generation.name] = json.dumps(_read_json(generation), indent=1).encode()
    return files


def _with_generation_eos(spec: ModelSpec, files: dict[str, bytes]) -> ModelSpec:
    """Chat models often name more end tokens in generation_config.json than in config.json."""
    more = token_ids(json.loads(files.get("generation_config.json", b"{}")), "eos_token_id")
    merged = tuple(dict.fromkeys(spec.eos_token_ids + more))
    return msgspec.structs.replace(spec, eos_token_ids=merged)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        document = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return document
