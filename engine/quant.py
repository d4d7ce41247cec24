"""Quantised weights: how they are made, and what they mean in torch. Knows no model, no files and no packing.

Shape suffixes: N outputs, H inputs, B blocks of 64 weights. A weight is taken row by row, [N, H] flattened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Quantization = Literal["none", "int8", "nf4", "fp8"]

NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA."""
NF4_LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
"""The 16 values of a 4-bit NormalFloat (Dettmers et al. 2023): quantiles of a normal distribution, and an exact zero."""
FP8_LARGEST = 448.0
_CHUNK_WEIGHTS = 1 << 20
"""Quantised at a time, so that the float32 copies in between stay small."""


class QuantizationError(Exception):
    """A weight that cannot be quantised; the message says why."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """weight[n] = codes[n] * scale[n]: symmetric, one scale for each output."""

    codes: Tensor
    """int8 [N, H], -127 .. 127"""
    scale: Tensor
    """float32 [N]"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def rows(self, index: Tensor) -> Tensor:
        """The weights of these outputs, float32 [len(index), H]."""
        return self.codes[index].float() * self.scale[index, None]

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    def product(self, x_TH: Tensor, bias_N: Tensor | None) -> Tensor:
        """[T, H] -> float32 [T, N]. Codes are exact in bfloat16; the scale is applied to their sums."""
        sums_TN = F.linear(x_TH, self.codes.to(x_TH.dtype)).float() * self.scale
        return sums_TN if bias_N is None else sums_TN + bias_N


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """weight = level[code] * absmax[block], rounded to the dtype that is computed in: QLoRA's, as bitsandbytes has it."""

    codes: Tensor
    """uint8 [N * H / 2] rounded up: two codes a byte, the first in the high half"""
    absmax: Tensor
    """float32 [B], over all of the flattened weight: a block may begin in one row and end in the next."""
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def whole_blocks(self) -> bool:
        """Every block lies in one row."""
        return self.shape[1] % NF4_BLOCK == 0

    def rows(self, index: Tensor) -> Tensor:
        """The weights of these outputs before rounding, float32 [len(index), H]."""
        position = index[:, None] * self.shape[1] + torch.arange(self.shape[1])
        codes = (self.codes[position // 2] >> (4 * (1 - position % 2)).to(torch.uint8)) & 15
        return NF4_LEVELS[codes.long()] * self.absmax[position // NF4_BLOCK]

    def dense(self, dtype: torch.dtype) -> Tensor:
        num_rows, width = self.shape
        out_NH, step = torch.empty(self.shape, dtype=dtype), max(1, _CHUNK_WEIGHTS // width)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            out_NH[start:stop] = self.rows(torch.arange(start, stop))
        return out_NH

    def product(self, x_TH: Tensor, bias_N: Tensor | None) -> Tensor:
        """[T, H] -> float32 [T, N]"""
        return F.linear(
            x_TH, self.dense(x_TH.dtype), None if bias_N is None else bias_N.to(x_TH.dtype)
        ).float()


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """weight[n] = codes[n] * scale[n]: 8-bit floats (e4m3, no infinities), one scale for each output."""

    codes: Tensor
    """float8_e4m3fn [N, H]"""
    scale: Tensor
    """float32 [N]"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def rows(self, index: Tensor) -> Tensor:
        return self.codes[index].float() * self.scale[index, None]

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    def product(self, x_TH: Tensor, bias_N: Tensor | None) -> Tensor:
        """[T, H] -> float32 [T, N]: both sides in e4m3, x with one scale a row, as tensor cores multiply them."""
        x_codes, x_scale_T = _fp8_rows(x_TH)
        sums_TN = F.linear(x_codes.float(), self.codes.float()) * x_scale_T[:, None] * self.scale
        return sums_TN if bias_N is None else sums_TN + bias_N


QuantisedWeight: TypeAlias = Int8Weight | Nf4Weight | Fp8Weight


def quantise(weight_NH: Tensor, quantization: Quantization) -> Tensor | QuantisedWeight:
    """A weight in the named form; "none" gives it back.

    Raises:
        QuantizationError: it holds values that are not finite.
    """
    if quantization == "none":
        return weight_NH
    if quantization == "nf4":
        nf4 = _quantise_nf4(weight_NH)
        made, scale = nf4, nf4.absmax
    else:
        made = Fp8Weight(*_fp8_rows(weight_NH)) if quantization == "fp8" else _quantise_int8(weight_NH)
        scale = made.scale
    if not torch.isfinite(scale).all():  # a scale is the largest magnitude of what shares it
        raise QuantizationError("the weight holds values that are not finite")
    return made


def stack(weights: Sequence[Tensor | QuantisedWeight], dtype: torch.dtype) -> Tensor | QuantisedWeight:
    """One weight of all outputs, one after the other. Of different forms, or in blocks that rows share, it is dense."""
    first = weights[0]
    if len(weights) == 1 and not isinstance(first, Tensor):
        return first
    if all(isinstance(weight, Int8Weight | Fp8Weight) and type(weight) is type(first) for weight in weights):
        codes = torch.cat([weight.codes for weight in weights])  # type: ignore[union-attr]
        return type(first)(codes, torch.cat([weight.scale for weight in weights]))  # type: ignore
    if all(isinstance(weight, Nf4Weight) and weight.whole_blocks for weight in weights):
        blocks = [weight for weight in weights if isinstance(weight, Nf4Weight)]
        codes, absmax = (
            torch.cat([each.codes for each in blocks]),
            torch.cat([each.absmax for each in blocks]),
        )
        return Nf4Weight(codes, absmax, (sum(each.shape[0] for each in blocks), blocks[0].shape[1]))
    dense = [weight if isinstance(weight, Tensor) else weight.dense(dtype) for weight in weights]
    return torch.cat([weight.to(dtype) for weight in dense])


def _quantise_int8(weight_NH: Tensor) -> Int8Weight:
    codes_NH = torch.empty(weight_NH.shape, dtype=torch.int8)
    scale_N = torch.empty(weight_NH.shape[0])
    step = max(1, _CHUNK_WEIGHTS // weight_NH.shape[1])
    for start in range(0, weight_NH.shape[0], step):
        part = weight_NH[start : start + step].float()
        scale = _scale(part, 127.0)
        codes_NH[start : start + step] = (part / scale[:, None]).round_().clamp_(-127, 127)
        scale_N[start : start + step] = scale
    return Int8Weight(codes_NH, scale_N)


def _quantise_nf4(weight_NH: Tensor) -> Nf4Weight:
    """As bitsandbytes does: scaled by one over the block's largest magnitude, then the nearest level."""
    num_rows, width = weight_NH.shape
    flat, count = weight_NH.reshape(-1), num_rows * width
    codes, absmax = torch.empty(-(-count // 2), dtype=torch.uint8), torch.empty(-(-count // NF4_BLOCK))
    bounds = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    for start in range(0, count, _CHUNK_WEIGHTS):
        part = flat[start : start + _CHUNK_WEIGHTS].float()
        blocks_B64 = F.pad(part, (0, -len(part) % NF4_BLOCK)).view(-1, NF4_BLOCK)
        largest_B = blocks_B64.abs().amax(1)
        scaled = (blocks_B64 * (1.0 / largest_B.clamp(min=1e-38))[:, None]).clamp(-1, 1)
        found = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).view(-1, 2)
        pairs = (found[:, 0] << 4) | found[:, 1]
        codes[start // 2 : (start + len(part) + 1) // 2] = pairs[: (len(part) + 1) // 2]
        absmax[start // NF4_BLOCK : start // NF4_BLOCK + len(largest_B)] = largest_B
    return Nf4Weight(codes, absmax, (num_rows, width))


def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as e4m3, and what each is to be multiplied by."""
    wide = x.float()
    scale = _scale(wide, FP8_LARGEST)
    return (wide / scale[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), scale


def _scale(rows: Tensor, largest: float) -> Tensor:
    """What makes each row's largest magnitude `largest`; 1 for a row of zeros."""
    scale = rows.abs().amax(1) / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)
