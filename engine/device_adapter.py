"""A host adapter in the form the kernels read: low-rank pairs, DoRA's scales, biases. Knows no files and no slots."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.host_adapter import AdapterError, HostAdapter, LoraWeights, VocabularyWeights
from engine.kernels.reference import Linear, LoraEntry

_ROWS = 2048
"""Rows of a base weight that are unpacked at once."""
_SAME_LENGTH = 0.05
"""Rows of two matrices that differ by no more in length (relative, on average) are the same but for rounding."""


class BaseWeights(Protocol):
    """The base model's weights, as they are computed with. `layer` is None for "embed_tokens" and "lm_head"."""

    def rows(self, layer: int | None, module: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop of a weight [outputs, inputs], float32."""
        ...

    def bias(self, layer: int | None, module: str) -> Tensor | None:
        """[outputs] float32"""
        ...

    def pack(self, weight_NH: Tensor) -> Linear:
        """A weight of an adapter as the kernels want it."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceVocabulary:
    """What an adapter does to the embedding or the head: y = y * scale + bias + B(A x)."""

    matrix: Linear | None
    """In place of the base's."""
    a: Linear | None
    """The head's: inputs are hidden, outputs the rank. The embedding's: one row of `rank` per token."""
    b: Linear | None
    """Inputs are the rank; scaled."""
    affine: Tensor | None
    """Scale and bias, float32 [2, outputs]."""


@dataclass(frozen=True, slots=True)
class DeviceAdapter:
    """An adapter ready for a slot, in the model's dtype."""

    slab: Tensor
    """Every A and B of `modules`."""
    modules: dict[tuple[int, str], LoraEntry]
    """By (layer, projection)."""
    embedding: DeviceVocabulary | None
    head: DeviceVocabulary | None


def prepare_adapter(adapter: HostAdapter, dtype: torch.dtype, base: BaseWeights) -> DeviceAdapter:
    """Bring a host adapter into device form, with alpha/r and DoRA's scale folded into B (in float32, before rounding).

    Raises:
        AdapterError: It was made for another base.
    """
    affines: dict[tuple[int, str], Tensor | None] = {}
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor, float]] = {}
    for key in sorted(adapter.modules.keys() | adapter.biases.keys()):
        layer, module = key
        weights, bias = adapter.modules.get(key), adapter.biases.get(key)
        scale = None if weights is None else _dora_scale(weights, base, layer, module)
        affines[key] = _affine(weights, scale, bias, base.bias(layer, module), f"{module} of layer {layer}")
        if weights is None:
            continue
        if scale is None and weights.b.dtype in (dtype, torch.float32):
            pairs[key] = weights.a, weights.b, weights.scaling
        else:
            pairs[key] = weights.a, _scaled(weights, scale), 1.0
    slab, placed = _place(pairs, dtype)
    modules = {key: LoraEntry(*placed.get(key, (None, None)), affine) for key, affine in affines.items()}
    modules = {key: entry for key, entry in modules.items() if entry.tensors()}
    embedding, head = adapter.embedding, adapter.head
    ready = _prepare_embedding(embedding, dtype, base)
    same = ready and ready.matrix and embedding and head and _equal(embedding.matrix, head.matrix)
    shared = ready.matrix if ready and same else None
    return DeviceAdapter(slab, modules, ready, _prepare_head(head, dtype, base, shared))


def _place(
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> tuple[Tensor, dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """One slab with every A and, transposed and scaled, every B; and where in it they are.

    Equal shapes are laid down at once: a few calls instead of two for every module, each of which would give the
    interpreter back to the loop's thread and wait for it again.
    """
    alike: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    for key, (a, b, factor) in pairs.items():
        alike.setdefault((a.shape, a.dtype, b.shape, b.dtype, factor), []).append(key)
    slab = torch.empty(sum(a.numel() + b.numel() for a, b, _ in pairs.values()), dtype=dtype)
    placed: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    used = 0
    for keys in alike.values():
        a_ERH = torch.stack([pairs[key][0] for key in keys])
        b_ENR = torch.stack([pairs[key][1] for key in keys])
        middle = used + a_ERH.numel()
        end = middle + b_ENR.numel()
        ours_a = slab[used:middle].view(a_ERH.shape).copy_(a_ERH)
        ours_b = slab[middle:end].view(len(keys), b_ENR.shape[2], b_ENR.shape[1])
        # Rounded once, to the slab's dtype.
        torch.mul(b_ENR.transpose(1, 2), pairs[keys[0]][2], out=ours_b)
        placed.update(zip(keys, zip(ours_a.unbind(), ours_b.unbind(), strict=True), strict=True))
        used = end
    return slab, placed


def _prepare_embedding(
    weights: VocabularyWeights | None, dtype: torch.dtype, base: BaseWeights
) -> DeviceVocabulary | None:
    if weights is None:
        return None
    _check_base(weights, base, "embed_tokens")
    matrix = None if weights.matrix is None else base.pack(weights.matrix.to(dtype))
    if (lora := weights.lora) is None:
        return DeviceVocabulary(matrix, None, None, None)
    scale = None
    if lora.magnitude is not None:
        squares = torch.zeros(lora.b.shape[0])
        for start in range(0, lora.a.shape[1], _ROWS):
            stop = min(start + _ROWS, lora.a.shape[1])
            deltas = lora.a[:, start:stop].float().T @ lora.b.float().T
            rows = base.rows(None, "embed_tokens", start, stop) + lora.scaling * deltas
            squares += rows.square().sum(0)
        scale = _ratio(lora.magnitude, squares.sqrt(), "embed_tokens")
    affine = None if scale is None else torch.stack([scale, torch.zeros_like(scale)])
    a_VR = base.pack(lora.a.T.to(dtype).contiguous())
    return DeviceVocabulary(matrix, a_VR, base.pack(_scaled(lora, scale).to(dtype)), affine)


def _prepare_head(
    weights: VocabularyWeights | None, dtype: torch.dtype, base: BaseWeights, matrix: Linear | None
) -> DeviceVocabulary | None:
    """`matrix`: what replaces the embedding, if it replaces the head as well."""
    if weights is None:
        return None
    _check_base(weights, base, "lm_head")
    if matrix is None and weights.matrix is not None:
        matrix = base.pack(weights.matrix.to(dtype))
    lora, old = weights.lora, base.bias(None, "lm_head")
    scale = None if lora is None else _dora_scale(lora, base, None, "lm_head")
    if weights.matrix is not None:
        # Its product starts without the base's bias.
        new = weights.bias if weights.bias is not None else old
        affine = None if new is None else torch.stack([torch.ones(len(new)), new.float()])
    else:
        affine = _affine(lora, scale, weights.bias, old, "lm_head")
    if lora is None:
        return DeviceVocabulary(matrix, None, None, affine)
    a_RH, b_VR = lora.a.to(dtype).contiguous(), _scaled(lora, scale).to(dtype)
    return DeviceVocabulary(matrix, base.pack(a_RH), base.pack(b_VR), affine)


def _scaled(weights: LoraWeights, scale: Tensor | None) -> Tensor:
    """B [outputs, rank] with everything in it that multiplies it."""
    b = weights.b.float() * weights.scaling
    return b if scale is None else b * scale[:, None]


def _affine(
    weights: LoraWeights | None, scale: Tensor | None, bias: Tensor | None, old: Tensor | None, name: str
) -> Tensor | None:
    """[2, outputs] that turns y = W x + old into scale * W x + bias + scaling * (B's own bias); None: nothing to do.

    `scale` multiplies neither bias, as in PEFT's DoRA.
    """
    if scale is None and bias is None and (weights is None or weights.bias is None):
        return None
    if bias is not None and old is None:
        raise AdapterError(f"it brings a bias for {name}, where this base has none")
    added = torch.zeros(1) if bias is None or old is None else bias.float() - old
    if scale is not None and old is not None:
        added = added + old - scale * old
    if weights is not None and weights.bias is not None:
        added = added + weights.scaling * weights.bias.float()
    if scale is None and not added.any():
        return None
    scale = torch.ones_like(added) if scale is None else scale
    return torch.stack(torch.broadcast_tensors(scale, added)).contiguous()


def _dora_scale(weights: LoraWeights, base: BaseWeights, layer: int | None, module: str) -> Tensor | None:
    """[outputs] magnitude / length of the rows of W + scaling * B A; None without DoRA."""
    if weights.magnitude is None:
        return None
    lengths = torch.empty(weights.b.shape[0])
    a = weights.a.float()
    for start in range(0, len(lengths), _ROWS):
        stop = min(start + _ROWS, len(lengths))
        rows = base.rows(layer, module, start, stop) + weights.scaling * (weights.b[start:stop].float() @ a)
        lengths[start:stop] = torch.linalg.vector_norm(rows, dim=1)
    return _ratio(weights.magnitude, lengths, module)


def _ratio(magnitude: Tensor, lengths: Tensor, name: str) -> Tensor:
    scale = magnitude.float() / lengths
    if not torch.isfinite(scale).all():
        raise AdapterError(f"{name}: its DoRA magnitudes scale a row of length zero")
    return scale


def _check_base(weights: VocabularyWeights, base: BaseWeights, name: str) -> None:
    """Refuse an adapter that was saved with another matrix under it: another base, or a resized vocabulary."""
    if not weights.base_lengths:
        return
    num_rows = len(weights.base_lengths[0])
    ours = torch.cat(
        [
            torch.linalg.vector_norm(base.rows(None, name, start, min(start + _ROWS, num_rows)), dim=1)
            for start in range(0, num_rows, _ROWS)
        ]
    )
    for theirs in weights.base_lengths:
        if (ours - theirs).abs().mean() > _SAME_LENGTH * theirs.mean():
            raise AdapterError(f"{name}.base_layer.weight is not this base's: it was trained on another one")


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
