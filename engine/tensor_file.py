"""A safetensors file in memory, as tensors that are views of it.

safetensors' own reader copies every tensor and holds the interpreter meanwhile: for an adapter of 5 MB 20 ms, in which
no step can begin.
"""

import math
import warnings
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


def view_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors by name, to be read only; they keep `data` alive. Raises `TensorFileError`."""
    stop = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or stop > len(data):
        raise TensorFileError("its header is longer than the file")
    try:
        header = msgspec.json.decode(data[_LENGTH:stop], type=dict[str, Any])
        header.pop("__metadata__", None)
        stored = msgspec.convert(header, dict[str, _Stored])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TensorFileError(f"its header cannot be read: {error}") from error
    tensors: dict[str, Tensor] = {}
    used = stop
    for name, entry in sorted(stored.items(), key=lambda item: item[1].data_offsets):
        start, end = (stop + offset for offset in entry.data_offsets)
        if start != used or end < start:
            raise TensorFileError(f"{name} does not begin where the tensor before it ends")
        used = end
        tensors[name] = _view(name, entry, data, start, end)
    if used != len(data):
        raise TensorFileError(f"{len(data)} bytes, of which the header describes {used}")
    return tensors


def _view(name: str, entry: _Stored, data: bytes, start: int, end: int) -> Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise TensorFileError(f"{name} is {entry.dtype!r}")
    count = math.prod(entry.shape)
    sane = all(0 <= size < 2**31 for size in entry.shape)
    if not sane or count * dtype.itemsize != end - start or end > len(data):
        raise TensorFileError(f"{name} has {end - start} bytes for {entry.shape} of {entry.dtype}")
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if start % dtype.itemsize:
        data, start = data[start:end], 0
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(entry.shape)
