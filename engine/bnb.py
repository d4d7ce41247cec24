"""4-bit weights as bitsandbytes saves them beside each other in safetensors. Knows no files and no model."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.quant import NF4_BLOCK, NF4_LEVELS, Nf4Weight

STATE = "quant_state.bitsandbytes__nf4"
"""JSON: what a 4-bit weight `w` is; a tensor named `w.` and this."""
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
"""What belongs to one weight, each a tensor named after it."""


class BnbError(Exception):
    """A 4-bit weight or its description cannot be used; the message says which part."""


def check_config(quantization: object) -> None:
    """A config.json's quantization_config: 4-bit NF4 of bitsandbytes, or `BnbError`."""
    if not isinstance(quantization, Mapping):
        raise BnbError(f"must be an object, it is {quantization!r}")
    method = quantization.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise BnbError(
            f"quant_method {method!r} is not supported; use bitsandbytes' 4-bit nf4, the original, or a GGUF"
        )
    if quantization.get("load_in_4bit") is not True:
        raise BnbError(
            "of bitsandbytes only load_in_4bit is supported; use the original and quantization = int8"
        )
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise BnbError(f"bnb_4bit_quant_type {kind!r} is not supported, only nf4")


def owner(name: str) -> str | None:
    """The weight that a tensor is a part of; None for one that is no part."""
    for part in PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}")
    return None


def weight_state(packed: Tensor) -> dict[str, Any]:
    """What the `STATE` tensor says; its "shape" is two sizes, its "blocksize" a number of whole blocks."""
    try:
        state = json.loads(packed.numpy().tobytes())
    except ValueError as error:
        raise BnbError(f"{STATE} is not JSON: {error}") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise BnbError(f"{STATE} names no shape of two sizes")
    if state.get("quant_type") != "nf4":
        raise BnbError(f"quant_type {state.get('quant_type')!r} is not supported, only nf4")
    if not _is_size(state.get("blocksize")) or state["blocksize"] % NF4_BLOCK:
        raise BnbError(f"blocksize must be a multiple of {NF4_BLOCK}, it is {state.get('blocksize')!r}")
    return state


def nf4_weight(codes: Tensor, parts: Mapping[str, Tensor]) -> Nf4Weight:
    """A weight from its tensors, of which it keeps none; doubly quantised scales are dequantised.

    `parts`: by the names in `PARTS`.
    """
    state = weight_state(parts[STATE])
    num_rows, width = state["shape"]
    num_blocks = -(-num_rows * width // state["blocksize"])
    codes = codes.clone().view(-1).view(torch.uint8)
    if len(codes) != -(-num_rows * width // 2):
        raise BnbError(f"{len(codes)} bytes of codes are not those of {num_rows} x {width} weights")
    levels = _part(parts, "quant_map", len(NF4_LEVELS))
    if not torch.allclose(levels.float(), NF4_LEVELS, rtol=0, atol=1e-6):
        raise BnbError("quant_map does not hold the levels of nf4")
    absmax = _part(parts, "absmax", num_blocks)
    if "nested_absmax" in parts:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not isinstance(size, int) or size < 1 or not isinstance(offset, int | float):
            raise BnbError(f"{STATE} names no nested_blocksize and nested_offset")
        scale = _part(parts, "nested_absmax", -(-num_blocks // size)).float()
        table = _part(parts, "nested_quant_map", 256).float()
        absmax = table[absmax.long()] * scale.repeat_interleave(size)[:num_blocks] + offset
    elif not absmax.is_floating_point():
        raise BnbError("absmax is not floating-point and there is no nested_absmax")
    absmax = absmax.float().repeat_interleave(state["blocksize"] // NF4_BLOCK)
    return Nf4Weight(codes, absmax[: -(-num_rows * width // NF4_BLOCK)].contiguous(), (num_rows, width))


def _part(parts: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    if name not in parts:
        raise BnbError(f"{name} is missing")
    if parts[name].numel() != size:
        raise BnbError(f"{name} has {parts[name].numel()} values, not {size}")
    return parts[name].view(-1)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
