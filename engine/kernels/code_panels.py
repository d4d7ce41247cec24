"""Quantised weights in the order in which quant.c reads them: panels of 32 outputs. Knows no arithmetic.

Shape suffixes: P panels, N outputs, H inputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.reference import Linear
from engine.quant import NF4_BLOCK, NF4_LEVELS, Int8Weight, Nf4Weight, QuantisedWeight

PANEL = 32
"""Outputs of a panel."""
INT8, NF4 = 0, 1
"""As in quant.c."""

_CHUNK_BYTES = 1 << 20
"""Put in order at a time, so that the copies in between stay small."""


@dataclass(frozen=True, slots=True)
class CodePanels(Linear):
    """A quantised weight; `weight` holds its codes.

    int8: [P, H / 2, 4, 2, 8]: two inputs of 32 outputs are 64 bytes. In order of (output, input) they would be two
    vectors of four parts of eight; the parts of both take turns, since that is how bytes are unpacked to 16 bits.
    A code is a sign and a magnitude. `scale`: [P * 32].

    nf4: [P, H / 4, 8, 2, 2, 2]: four inputs of 32 outputs are 64 bytes, 16 lanes of 8 codes: the byte of output
    (v, half, j) and input (pair, i) is [j, i, pair, v], its low four bits are those of half 0. `scale`: [P, H / 64, 32].
    """

    scale: Tensor
    form: int

    @property
    def nbytes(self) -> int:
        return super(CodePanels, self).nbytes + self.scale.nbytes


def fits(weight: QuantisedWeight) -> bool:
    """Whether quant.c can multiply by it."""
    if isinstance(weight, Nf4Weight):
        return weight.whole_blocks
    return isinstance(weight, Int8Weight) and weight.shape[1] % 2 == 0


def pack(weight: QuantisedWeight, bias_N: Tensor | None) -> CodePanels:
    """Panels of a weight that `fits`."""
    outputs, inputs = weight.shape
    spare, count = -outputs % PANEL, -(-outputs // PANEL)
    bias = None if bias_N is None else bias_N.float().contiguous()
    if isinstance(weight, Int8Weight):
        rows, order, form = weight.codes, _int8_order, INT8
        packed = torch.empty(count, inputs // 2, 4, 2, 8, dtype=torch.uint8)
        scale = F.pad(weight.scale, (0, spare))
    elif isinstance(weight, Nf4Weight):
        rows, order, form = weight.codes.view(outputs, inputs // 2), _nf4_order, NF4
        packed = torch.empty(count, inputs // 4, 8, 2, 2, 2, dtype=torch.uint8)
        absmax = F.pad(weight.absmax.view(outputs, -1), (0, 0, 0, spare))
        scale = absmax.view(-1, PANEL, inputs // NF4_BLOCK).transpose(1, 2).contiguous()
    else:
        raise TypeError(f"{type(weight).__name__} has no panels")
    step = max(1, _CHUNK_BYTES // (PANEL * inputs))
    for first in range(0, count, step):
        part = rows[first * PANEL : (first + step) * PANEL]
        packed[first : first + step] = order(F.pad(part, (0, 0, 0, -len(part) % PANEL)))
    return CodePanels(packed, bias, outputs, scale, form)


def _int8_order(codes_NH: Tensor) -> Tensor:
    signed = codes_NH.abs().to(torch.uint8) | ((codes_NH < 0).to(torch.uint8) << 7)
    words = signed.view(-1, 2, 4, 4, codes_NH.shape[1] // 2, 2)  # panel, vector, part, output, two, input
    return words.permute(0, 4, 2, 1, 3, 5).reshape(-1, codes_NH.shape[1] // 2, 4, 2, 8)


def _nf4_order(pairs: Tensor) -> Tensor:
    codes = torch.stack([pairs >> 4, pairs & 15], -1)
    codes = codes.view(-1, 2, 2, 8, pairs.shape[1] // 2, 2, 2)  # panel, v, half, j, four, pair, i
    codes = codes.permute(0, 4, 3, 6, 5, 1, 2)  # panel, four, j, i, pair, v, half
    return codes[..., 0] | (codes[..., 1] << 4)


def unpack_rows(panels: CodePanels, index: Tensor) -> Tensor:
    """The weights of these outputs, before any rounding: float32 [len(index), H]."""
    panel, output = index // PANEL, index % PANEL
    if panels.form == INT8:
        words = panels.weight.view(*panels.weight.shape[:4], 4, 2)
        codes = words[panel, :, output // 4 % 4, output // 16, output % 4].flatten(1)
        magnitude = (codes & 127).float()
        return torch.where(codes > 127, -magnitude, magnitude) * panels.scale[index, None]
    both = panels.weight[panel, :, output % 8, :, :, output // 16]  # [rows, H / 4, i, pair]
    half = (output // 8 % 2 * 4).to(torch.uint8)
    codes = (both >> half[:, None, None, None] & 15).transpose(2, 3).flatten(1)
    absmax = panels.scale[panel, :, output].repeat_interleave(NF4_BLOCK, 1)
    return NF4_LEVELS[codes.long()] * absmax
