"""Embedding and head of a mixed batch: the base's rows, and those of adapters that change either. Knows no layers.

Shape suffixes: T rows of the step, S rows whose logits are wanted, H hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.device_adapter import DeviceVocabulary
from engine.kernels.reference import Linear, ReferenceKernels


def embed(
    kernels: ReferenceKernels,
    matrix: Linear,
    dtype: torch.dtype,
    batch: Batch,
    adapted: Mapping[int, DeviceVocabulary],
) -> Tensor:
    """float32 [T, H] for the batch's tokens; `adapted`: by slot, the adapters that change the embedding."""
    rows_TH = kernels.embed(batch.token_ids, matrix)
    if not adapted:
        return rows_TH
    for slot, start, end in zip(
        batch.segment_slot.tolist(), batch.segment_start.tolist(), batch.segment_end.tolist(), strict=True
    ):
        if (adapter := adapted.get(slot)) is None:
            continue
        token_ids, rows = batch.token_ids[start:end], rows_TH[start:end]
        if adapter.matrix is not None:
            rows = kernels.embed(token_ids, adapter.matrix)
        shrunk = None if adapter.a is None else kernels.embed(token_ids, adapter.a).to(dtype)
        rows_TH[start:end] = _adapt(kernels, rows, shrunk, adapter)
    return rows_TH


def logits(
    kernels: ReferenceKernels,
    head: Linear,
    hidden_SH: Tensor,
    slots: Sequence[int | None],
    adapted: Mapping[int, DeviceVocabulary],
) -> Tensor:
    """float32 [S, V]; `slots`: each row's adapter, `adapted`: by slot, the adapters that change the head."""
    hidden_SH = hidden_SH.contiguous()
    if not adapted:
        return kernels.logits(hidden_SH, head)
    replaced = {slot for slot, adapter in adapted.items() if adapter.matrix is not None}
    kept = [row for row, slot in enumerate(slots) if slot not in replaced]
    logits_SV = torch.empty(len(hidden_SH), head.num_outputs)
    if kept:
        logits_SV[kept] = kernels.logits(hidden_SH[kept], head)
    for slot, adapter in adapted.items():
        rows = [row for row, own in enumerate(slots) if own == slot]
        if not rows:
            continue
        x = hidden_SH[rows]
        y = logits_SV[rows] if adapter.matrix is None else kernels.logits(x, adapter.matrix)
        shrunk = None if adapter.a is None else kernels.linear(x, adapter.a)
        logits_SV[rows] = _adapt(kernels, y, shrunk, adapter)
    return logits_SV


def _adapt(kernels: ReferenceKernels, y: Tensor, shrunk: Tensor | None, adapter: DeviceVocabulary) -> Tensor:
    """y * scale + bias + B applied to A's output [rows, rank]."""
    if adapter.affine is not None:
        y = y * adapter.affine[0] + adapter.affine[1]
    if shrunk is not None and adapter.b is not None:
        y = y + kernels.logits(shrunk, adapter.b)
    return y
