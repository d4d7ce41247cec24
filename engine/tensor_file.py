"""A safetensors file in memory, as tensors that are views of it.

safetensors' own reader copies every tensor and holds the interpreter meanwhile: for an adapter of 5 MB 20 ms, in which
no step can begin.
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import torch
from torch import Tensor

_LENGTH = 8
"""Bytes before the header, that say how long it is."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

# The bytes are not writable; nobody writes to these tensors.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


class TensorFileError(Exception):
    """It is no whole safetensors file; the message says why."""


class _Stored(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(slots=True)
class _Run:
    """Tensors of one dtype that follow one another."""

    dtype: torch.dtype
    start: int
    """Its first byte, counted from the end of the header."""
    end: int
    names: list[str]
    shapes: list[torch.Size]


def view_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors by name, to be read only; they keep `data` alive. Raises `TensorFileError`."""
    stop = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or stop > len(data):
        raise TensorFileError("its header is longer than the file")
    runs = _layout(data[_LENGTH:stop])
    end = stop + (runs[-1].end if runs else 0)
    if end != len(data):
        raise TensorFileError(f"{len(data)} bytes, of which the header describes {end}")
    tensors: dict[str, Tensor] = {}
    for run in runs:
        offset, counts = stop + run.start, list(map(math.prod, run.shapes))
        whole = data
        if offset % run.dtype.itemsize:
            whole, offset = data[offset : stop + run.end], 0
        if run.end == run.start:
            flat = torch.empty(0, dtype=run.dtype)
        else:
            flat = torch.frombuffer(whole, dtype=run.dtype, count=sum(counts), offset=offset)
        parts = flat.split_with_sizes(counts)
        tensors.update(zip(run.names, map(Tensor.view, parts, run.shapes), strict=True))
    return tensors


@lru_cache(maxsize=16)
def _layout(header: bytes) -> list[_Run]:
    """What a header says, in the order of the file. Adapters of one recipe have equal ones."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, Any])
        entries.pop("__metadata__", None)
        stored = msgspec.convert(entries, dict[str, _Stored])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TensorFileError(f"its header cannot be read: {error}") from error
    runs: list[_Run] = []
    used = 0
    for name, entry in sorted(stored.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if start != used or end < start:
            raise TensorFileError(f"{name} does not begin where the tensor before it ends")
        used = end
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise TensorFileError(f"{name} is {entry.dtype!r}")
        count = math.prod(entry.shape)
        if not all(0 <= size < 2**31 for size in entry.shape) or count * dtype.itemsize != end - start:
            raise TensorFileError(f"{name} has {end - start} bytes for {entry.shape} of {entry.dtype}")
        if not runs or runs[-1].dtype != dtype:
            runs.append(_Run(dtype, start, end, [], []))
        run = runs[-1]
        run.end = end
        run.names.append(name)
        run.shapes.append(torch.Size(entry.shape))
    return runs
