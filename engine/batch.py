"""A `StepPlan` as arrays. Knows positions, pages and adapter segments, nothing of the model.

Shape suffixes: T rows (tokens of the step), S sequences (chunks), G adapter segments, W width of the block tables.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.step import StepPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one step; int32 unless said otherwise."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] position of each row in its sequence."""
    kv_slots: Tensor
    """[T] where the row's key and value go: block * block_size + offset."""
    query_start: Tensor
    """[S + 1] first row of each sequence."""
    context: Tensor
    """[S] keys each sequence's last row sees (without a window)."""
    tables: Tensor
    """[S, W] block tables, padded with 0."""
    max_context: int
    segment_slot: Tensor
    """[G] adapter slot of each run of rows that have one; rows of the base are in no segment."""
    segment_start: Tensor
    segment_end: Tensor
    slots: frozenset[int]
    """Adapter slots in the batch."""


def build_batch(plan: StepPlan, block_size: int) -> Batch:
    """Lay the chunks of a plan one after the other, in its order."""
    rows = plan.num_tokens
    token_ids = np.empty(rows, np.int64)
    positions = np.empty(rows, np.int32)
    kv_slots = np.empty(rows, np.int32)
    query_start = np.zeros(len(plan.chunks) + 1, np.int32)
    context = np.empty(len(plan.chunks), np.int32)
    tables = np.zeros((len(plan.chunks), max(len(c.sequence.block_table) for c in plan.chunks)), np.int32)
    segments: list[list[int]] = []
    row = 0
    for index, chunk in enumerate(plan.chunks):
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.num_tokens
        stop = row + chunk.num_tokens
        tables[index, : len(sequence.block_table)] = sequence.block_table
        token_ids[row:stop] = chunk.token_ids
        position = np.arange(start, end, dtype=np.int32)
        positions[row:stop] = position
        kv_slots[row:stop] = tables[index, position // block_size] * block_size + position % block_size
        query_start[index + 1], context[index] = stop, end
        if sequence.slot is not None:
            if segments and segments[-1][0] == sequence.slot and segments[-1][2] == row:
                segments[-1][2] = stop
            else:
                segments.append([sequence.slot, row, stop])
        row = stop
    segment_GX = np.array(segments, np.int32).reshape(-1, 3).T.copy()
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        kv_slots=torch.from_numpy(kv_slots),
        query_start=torch.from_numpy(query_start),
        context=torch.from_numpy(context),
        tables=torch.from_numpy(tables),
        max_context=int(context.max()),
        segment_slot=torch.from_numpy(segment_GX[0]),
        segment_start=torch.from_numpy(segment_GX[1]),
        segment_end=torch.from_numpy(segment_GX[2]),
        slots=frozenset(segment[0] for segment in segments),
    )
