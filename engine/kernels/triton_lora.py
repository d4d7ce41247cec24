"""The low-rank products of a step on CUDA, as two Triton kernels. Knows tables of addresses, nothing of adapters.

`shrink` writes A x as float32 planes, one for each part of the inputs, and `expand` adds B times their sum into the
slices of a fused projection. Every sum has one order and nothing is added atomically, so the same step gives the same
bits. Rows of the base are in no block and cost nothing; ranks are the true ones.
Shape suffixes: T rows of the step, H inputs, N outputs of all slices, X blocks, M rows of a block.
"""

# Triton types a kernel's parameters as the kernel sees them, not as a launch passes them.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.reference import LoraGroup

BLOCK_ROWS = 16
"""Rows of a block: the least that tensor cores multiply. With 16 the products are mma.sync, so that the bridge may be
cast in registers: pipelined wgmma with a register operand is miscompiled by ptxas < 13.3 on SM90."""
_BLOCK_RANK = 16
_BLOCK_INPUTS = 128
_BLOCK_OUTPUTS = 128


@dataclass(frozen=True, slots=True)
class LoraRoute:
    """Which rows share an adapter, in blocks of `BLOCK_ROWS`; int32, on the kernels' device."""

    slot_X: Tensor
    """Adapter slot of each block, -1 for a block without rows: a graph's route has as many blocks as it may need."""
    rows_XM: Tensor
    """The rows of each block, -1 where there is none."""


def route(
    segments: list[tuple[int, int, int]], num_blocks: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`LoraRoute`'s arrays for segments (slot, first row, row after the last), filled up to `num_blocks`."""
    rows: dict[int, list[int]] = {}
    for slot, start, end in segments:
        rows.setdefault(slot, []).extend(range(start, end))
    needed = sum(-(-len(each) // BLOCK_ROWS) for each in rows.values())
    total = needed if num_blocks is None else num_blocks
    if total < needed:
        raise ValueError(f"{needed} blocks do not fit into {total}")
    slot_X, rows_XM = np.full(total, -1, np.int32), np.full((total, BLOCK_ROWS), -1, np.int32)
    block = 0
    for slot, own in sorted(rows.items()):
        for start in range(0, len(own), BLOCK_ROWS):
            part = own[start : start + BLOCK_ROWS]
            slot_X[block], rows_XM[block, : len(part)] = slot, part
            block += 1
    return slot_X, rows_XM


def most_blocks(rows: int, slots: int) -> int:
    """Blocks that a step of so many rows can need: what a graph's route is filled up to."""
    return min(rows, rows // BLOCK_ROWS + slots)


def parts(rows: int, inputs: int) -> int:
    """Parts the inputs are cut into: few rows are few blocks, and would leave most of the device idle."""
    wanted = 8 if rows <= 16 else 4 if rows <= 64 else 1
    return max(1, min(wanted, inputs // (2 * _BLOCK_INPUTS)))


def lora(
    x_TH: Tensor, y_TN: Tensor, routed: LoraRoute, group: LoraGroup, max_rank: int, split: int | None = None
) -> None:
    """y[row, slice] = y[row, slice] * scale + bias + B(A x[row]), in place, for the rows of the route.

    Args:
        group: Its tables lie on the device of x; their contents may change between replays of a graph.
        max_rank: No adapter's rank is above it; fixes the grid and the bridge's width.
        split: Parts of the inputs; None for `parts`. The same for every batch where results may not depend on it.
    """
    blocks, slices, inputs = len(routed.slot_X), len(group.sizes), x_TH.shape[1]
    if blocks == 0:
        return
    split = parts(x_TH.shape[0], inputs) if split is None else split
    tiles = triton.cdiv(max_rank, _BLOCK_RANK)
    width = tiles * _BLOCK_RANK
    bridge = torch.empty(split, blocks * BLOCK_ROWS, slices, width, dtype=torch.float32, device=x_TH.device)
    shrink[(blocks, slices * tiles, split)](
        x_TH,
        group.a_table,
        group.ranks,
        routed.slot_X,
        routed.rows_XM,
        bridge,
        x_TH.stride(0),
        inputs,
        triton.cdiv(triton.cdiv(inputs, _BLOCK_INPUTS), split) * _BLOCK_INPUTS,
        blocks * BLOCK_ROWS * slices * width,
        SLICES=slices,
        TILES=tiles,
        BLOCK_M=BLOCK_ROWS,
        BLOCK_R=_BLOCK_RANK,
        BLOCK_K=_BLOCK_INPUTS,
    )
    # No slice is wider than all of them together: the grid is known without reading `sizes`.
    expand[(blocks, triton.cdiv(y_TN.shape[1], _BLOCK_OUTPUTS) + slices)](
        bridge,
        y_TN,
        group.b_table,
        group.affine_table,
        group.ranks,
        group.offsets,
        group.sizes,
        routed.slot_X,
        routed.rows_XM,
        y_TN.stride(0),
        blocks * BLOCK_ROWS * slices * width,
        SLICES=slices,
        WIDTH=width,
        SPLIT=split,
        BLOCK_M=BLOCK_ROWS,
        BLOCK_R=_BLOCK_RANK,
        BLOCK_N=_BLOCK_OUTPUTS,
    )


@triton.jit
def shrink(
    x_ptr,
    a_table,
    ranks,
    slot_ptr,
    rows_ptr,
    bridge_ptr,
    x_stride,
    inputs,
    part_inputs,
    plane_size,
    SLICES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """bridge[part, block row, slice, rank] = sum over the part's inputs of x * A; program (block, slice * tile, part)."""
    block, part = tl.program_id(0), tl.program_id(2)
    slice_index, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    slot = tl.load(slot_ptr + block)
    if slot >= 0:
        entry = slot * SLICES + slice_index
        rank = tl.load(ranks + entry)
        if tile * BLOCK_R < rank:
            element = x_ptr.dtype.element_ty
            a_ptr = tl.load(a_table + entry).to(tl.pointer_type(element))
            row_M = tl.load(rows_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            rank_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            sums_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            first = part * part_inputs
            for start in range(first, tl.minimum(first + part_inputs, inputs), BLOCK_K):
                input_K = start + tl.arange(0, BLOCK_K)
                x_MK = tl.load(
                    x_ptr + row_M[:, None] * x_stride + input_K[None, :],
                    (row_M[:, None] >= 0) & (input_K[None, :] < inputs),
                    0.0,
                )
                a_KR = tl.load(
                    a_ptr + rank_R[None, :] * inputs + input_K[:, None],
                    (rank_R[None, :] < rank) & (input_K[:, None] < inputs),
                    0.0,
                )
                sums_MR = tl.dot(x_MK, a_KR, sums_MR, input_precision="ieee")
            place_M = (block * BLOCK_M + tl.arange(0, BLOCK_M)) * SLICES + slice_index
            plane = bridge_ptr + part.to(tl.int64) * plane_size
            tl.store(plane + place_M[:, None] * (TILES * BLOCK_R) + rank_R[None, :], sums_MR)


@triton.jit
def expand(
    bridge_ptr,
    y_ptr,
    b_table,
    affine_table,
    ranks,
    offsets,
    sizes,
    slot_ptr,
    rows_ptr,
    y_stride,
    plane_size,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = y * scale + bias + (sum of the bridge's planes) * B; program (block, tile of some slice's outputs)."""
    block, tile = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_ptr + block)
    # Tiles are dealt to the slices in their order; those that are left over after the last do nothing.
    slice_index, size, first = -1, 0, 0
    before = 0
    for index in tl.static_range(SLICES):
        its_size = tl.load(sizes + index)
        its_tiles = tl.cdiv(its_size, BLOCK_N)
        own = (tile >= before) & (tile < before + its_tiles)
        slice_index = tl.where(own, index, slice_index)
        size = tl.where(own, its_size, size)
        first = tl.where(own, (tile - before) * BLOCK_N, first)
        before += its_tiles
    if (slot >= 0) & (slice_index >= 0):
        entry = slot * SLICES + slice_index
        rank = tl.load(ranks + entry)
        affine = tl.load(affine_table + entry)
        if (rank > 0) | (affine != 0):
            element = y_ptr.dtype.element_ty
            b_ptr = tl.load(b_table + entry).to(tl.pointer_type(element))
            row_M = tl.load(rows_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            output_N = first + tl.arange(0, BLOCK_N)
            offset = tl.load(offsets + slice_index)
            y_MN = y_ptr + row_M[:, None] * y_stride + offset + output_N[None, :]
            mask_MN = (row_M[:, None] >= 0) & (output_N[None, :] < size)
            result_MN = tl.load(y_MN, mask_MN, 0.0).to(tl.float32)
            if affine != 0:
                affine_ptr = affine.to(tl.pointer_type(tl.float32))
                scale_N = tl.load(affine_ptr + output_N, output_N < size, 1.0)
                bias_N = tl.load(affine_ptr + size + output_N, output_N < size, 0.0)
                result_MN = result_MN * scale_N[None, :] + bias_N[None, :]
            delta_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            place_M = (block * BLOCK_M + tl.arange(0, BLOCK_M)) * SLICES + slice_index
            for start in range(0, rank, BLOCK_R):
                rank_R = start + tl.arange(0, BLOCK_R)
                shrunk_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                for part in tl.static_range(SPLIT):
                    plane = bridge_ptr + part * plane_size.to(tl.int64)
                    shrunk_MR += tl.load(plane + place_M[:, None] * WIDTH + rank_R[None, :])
                b_RN = tl.load(
                    b_ptr + rank_R[:, None] * size + output_N[None, :],
                    (rank_R[:, None] < rank) & (output_N[None, :] < size),
                    0.0,
                )
                delta_MN = tl.dot(shrunk_MR.to(element), b_RN, delta_MN, input_precision="ieee")
            tl.store(y_MN, (result_MN + delta_MN).to(element), mask_MN)
