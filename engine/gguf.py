"""A GGUF file as metadata, a Hugging Face config and Hugging Face tensors. Knows no tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Metadata is parsed here because the gguf
package's reader makes an array view per vocabulary entry (seconds where this takes a tenth of one); quantised
blocks are decoded by the package.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.families import FAMILIES


class GgufError(Exception):
    """The file is damaged or holds something we do not support; the message names file and part."""


SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_CHUNK_ELEMENTS = 4 * 2**20
"""Tensors are dequantised in pieces of about this size, so that float32 never exists whole."""

_MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; `shape` is row-major, as in torch."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file, memory-mapped. Raises `GgufError` when it is damaged or unsupported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise GgufError(f"{path}: cannot be read: {error}") from error
        cursor = _Cursor(self._map, path)
        if cursor.take(4) != b"GGUF":
            raise GgufError(f"{path}: not a GGUF file")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise GgufError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        self._tensors = self._read_directory(cursor, num_tensors)
        self._hf_names = {_gguf_to_hf(name): name for name in self._tensors if name != "rope_freqs.weight"}
        self.config = self._hf_config()

    def _read_directory(self, cursor: "_Cursor", num_tensors: int) -> dict[str, GgufTensor]:
        listed = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.scalar("I")
            if num_dims > 4:
                raise GgufError(f"{self.path}: tensor {name} has {num_dims} dimensions")
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dims)]))
            listed.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise GgufError(f"{self.path}: general.alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in listed:
            tensors[name] = self._locate(name, shape, kind, start + offset)
        return tensors

    def _locate(self, name: str, shape: tuple[int, ...], kind_id: int, offset: int) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(kind_id)
        except ValueError:
            raise GgufError(f"{self.path}: tensor {name} has unknown type {kind_id}") from None
        if kind.name not in SUPPORTED_TYPES:
            raise GgufError(
                f"{self.path}: tensor {name} has type {kind.name}; supported: {', '.join(SUPPORTED_TYPES)}"
            )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise GgufError(f"{self.path}: tensor {name}: shape {shape} does not fit blocks of {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > len(self._map):
            raise GgufError(
                f"{self.path}: cut off: tensor {name} ends at byte {offset + num_bytes}, the file has {len(self._map)}"
            )
        return GgufTensor(kind.name, shape, offset, num_bytes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor under its Hugging Face name, with its shape."""
        return {hf: self._tensors[name].shape for hf, name in self._hf_names.items()}

    def fingerprint(self, update: Callable[[bytes | memoryview], object]) -> None:
        """Feed metadata, tensor directory and samples of the weights to a hash."""
        first = min((tensor.offset for tensor in self._tensors.values()), default=len(self._map))
        with memoryview(self._map) as view:
            update(view[:first])
            for tensor in self._tensors.values():
                update(view[tensor.offset : tensor.offset + min(tensor.num_bytes, 4096)])

    def tensor(self, hf_name: str, dtype: torch.dtype) -> Tensor:
        """Dequantised, with the rows of q and k in Hugging Face's order. Raises `KeyError` for no such tensor."""
        info = self._tensors[self._hf_names[hf_name]]
        kind = GGMLQuantizationType[info.kind]
        raw = np.frombuffer(self._map, np.uint8, info.num_bytes, info.offset)
        rows_NB = raw.reshape(info.shape[0] if len(info.shape) > 1 else 1, -1)
        out = torch.empty(info.shape, dtype=dtype)
        out_NH = out.view(rows_NB.shape[0], -1)
        order = self._row_order(hf_name, out.shape[0])
        if len(info.shape) == 1 and order is not None:  # a bias: its rows are its elements
            out.copy_(torch.from_numpy(dequantize(raw.copy(), kind).reshape(-1)[order]))
            return out
        step = max(1, _CHUNK_ELEMENTS // out_NH.shape[1])
        for start in range(0, len(rows_NB), step):
            piece = rows_NB[start : start + step] if order is None else rows_NB[order[start : start + step]]
            values = dequantize(np.array(piece), kind).astype(np.float32, copy=False)
            out_NH[start : start + step] = torch.from_numpy(values)
        return out

    def release(self) -> None:
        """Let go of the pages of the file that were read; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _row_order(self, hf_name: str, rows: int) -> np.ndarray | None:
        """llama.cpp interleaves the two halves of each rotary head of "llama"; this undoes it."""
        if self.metadata["general.architecture"] != "llama":
            return None
        if ".q_proj." in hf_name:
            heads = self.config["num_attention_heads"]
        elif ".k_proj." in hf_name:
            heads = self.config["num_key_value_heads"]
        else:
            return None
        if rows % (2 * heads):
            raise GgufError(f"{self.path}: {hf_name} has {rows} rows, which {heads} heads cannot share")
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _hf_config(self) -> dict[str, Any]:
        """The same facts as a `config.json`."""
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
            raise GgufError(
                f"{self.path}: architecture {architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
            )

        def fact(key: str, default: Any = None) -> Any:
            return self.metadata.get(f"{architecture}.{key}", default)

        def required(key: str) -> int:
            value = fact(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise GgufError(
                    f"{self.path}: {architecture}.{key} must be a positive integer, it is {value!r}"
                )
            return value

        if fact("expert_count"):
            raise GgufError(f"{self.path}: mixtures of experts are not supported")
        hidden_size, num_heads = required("embedding_length"), required("attention.head_count")
        head_dim = fact("attention.key_length", hidden_size // num_heads)
        if fact("attention.value_length", head_dim) != head_dim:
            raise GgufError(f"{self.path}: keys and values of different length are not supported")
        if fact("rope.dimension_count", head_dim) != head_dim:
            raise GgufError(f"{self.path}: rotary embedding of part of a head is not supported")
        window = fact("attention.sliding_window")
        vocabulary = self._tensors.get("token_embd.weight")
        biased = "blk.0.attn_q.bias" in self._tensors
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[architecture]],
            "model_type": architecture,
            "vocab_size": vocabulary.shape[0] if vocabulary else fact("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": required("feed_forward_length"),
            "num_hidden_layers": required("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": fact("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": _shortest(fact("attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_theta": _shortest(fact("rope.freq_base", 10_000.0)),
            "rope_scaling": self._rope_scaling(fact, head_dim),
            "max_position_embeddings": required("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if architecture == "llama":
            config |= {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in self._tensors}
            if window:
                config |= {
                    "architectures": ["MistralForCausalLM"],
                    "model_type": "mistral",
                    "sliding_window": window,
                }
        elif window:
            raise GgufError(f"{self.path}: {architecture}.attention.sliding_window is not supported")
        return config

    def _rope_scaling(self, fact: Callable[..., Any], head_dim: int) -> dict[str, Any] | None:
        kind = fact("rope.scaling.type", "linear" if fact("rope.scale_linear") else "none")
        if kind == "linear":
            return {"rope_type": "linear", "factor": fact("rope.scaling.factor", fact("rope.scale_linear"))}
        if kind != "none":
            raise GgufError(f"{self.path}: rotary scaling of type {kind!r} is not supported")
        if "rope_freqs.weight" not in self._tensors:
            return None
        return self._llama3_scaling(fact("rope.freq_base", 10_000.0), head_dim)

    def _llama3_scaling(self, theta: Any, head_dim: int) -> dict[str, Any]:
        """The parameters behind a table of frequency divisors: those of Llama 3.1 and 3.2, else refused."""
        if not isinstance(theta, float) or theta <= 0:
            raise GgufError(f"{self.path}: rope.freq_base must be a positive number, it is {theta!r}")
        info = self._tensors["rope_freqs.weight"]
        stored = np.frombuffer(self._map, np.float32, info.num_bytes // 4, info.offset)
        factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
        wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if (
            info.kind != "F32"
            or stored.shape != expected.shape
            or not np.allclose(stored, expected, rtol=1e-4)
        ):
            raise GgufError(f"{self.path}: rope_freqs.weight is not the rotary scaling of Llama 3.1 or 3.2")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    _FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    _STRING, _ARRAY = 8, 9

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise GgufError(
                f"{self._path}: cut off: metadata goes on past the end of the file ({len(self._data)} bytes)"
            )
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == self._STRING:
            return self.string()
        if kind in self._FORMATS:
            return self.scalar(self._FORMATS[kind])
        if kind != self._ARRAY:
            raise GgufError(f"{self._path}: unknown metadata type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item == self._STRING:
            return [self.string() for _ in range(count)]
        if item not in self._FORMATS:
            raise GgufError(f"{self._path}: metadata arrays of type {item} are not supported")
        code = self._FORMATS[item]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))


def _gguf_to_hf(name: str) -> str:
    """The Hugging Face name of a tensor; an unknown one keeps its own, and is refused as unexpected later."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, suffix = rest.rpartition(".")
    if part in _PARTS:
        return f"model.layers.{block}.{_PARTS[part]}.{suffix}"
    return name


_BLOCKS = FAMILIES["LlamaForCausalLM"].modules
_PARTS = {gguf: f"{_BLOCKS[module]}.{module}" for module, gguf in _MODULES.items()} | {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: 1e-05 where the file's 32 bits read 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
