"""What every kernel means, in plain torch: the oracle of the others, and the path where no compiler is found.

Shape suffixes: T rows (tokens) of the step, S sequences, H hidden, N outputs, D head size, P position.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import Batch
from engine.quant import QuantisedWeight

BLOCK = 16
"""Tokens of a KV block. The native kernels hold one block's keys in one vector."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight as its kernel wants it."""

    weight: Tensor
    bias: Tensor | None
    num_outputs: int

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class QuantisedLinear(Linear):
    """A quantised weight as it was made; `weight` holds its codes."""

    matrix: QuantisedWeight

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """What one adapter does to one projection: y = y * scale + bias + B(A x)."""

    a: Tensor | None
    """[rank, in], in the model's dtype and contiguous like `b`."""
    b: Tensor | None
    """B transposed and scaled [rank, size]; with neither, there is no delta."""
    affine: Tensor | None = None
    """Scale and bias, float32 [2, size]; None: 1 and 0."""

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a, self.b, self.affine) if tensor is not None]


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """One fused projection's adapters: what `lora` does to which slice of its output.

    Tables are [slots, slices], int64 on the CPU: addresses of an entry's tensors, 0 where it has none; `ranks` int32,
    0 where there is no delta.
    """

    offsets: Tensor
    sizes: Tensor
    a_table: Tensor
    b_table: Tensor
    affine_table: Tensor
    ranks: Tensor
    entries: list[list[LoraEntry | None]]
    """The same per slot and slice; keeps the tensors alive."""


class ReferenceKernels:
    """Torch operators only. Where a method takes `out`, the result is written there and returned."""

    name = "torch"

    def record(self, compute: Callable[[Batch], None], batch: Batch) -> Callable[[Batch], None]:
        """A function that does what `compute` does, for any batch with as many rows.

        `compute` must do nothing but call kernels, on tensors that stay where they are.
        """
        return compute

    def pack_linear(self, weight_NH: Tensor | QuantisedWeight, bias_N: Tensor | None) -> Linear:
        if isinstance(weight_NH, Tensor):
            return Linear(weight_NH, bias_N, weight_NH.shape[0])
        return QuantisedLinear(weight_NH.codes, bias_N, weight_NH.shape[0], weight_NH)

    def linear(self, x_TH: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, N], in the dtype of x."""
        if isinstance(linear, QuantisedLinear):
            return _into(out, linear.matrix.product(x_TH, linear.bias).to(x_TH.dtype))
        return _into(out, F.linear(x_TH, linear.weight, linear.bias))

    def logits(self, x_TH: Tensor, linear: Linear) -> Tensor:
        """As `linear`, but float32 out."""
        if isinstance(linear, QuantisedLinear):
            return linear.matrix.product(x_TH, linear.bias)
        return F.linear(x_TH, linear.weight, linear.bias).float()

    def rows(self, linear: Linear, start: int, stop: int) -> Tensor:
        """Rows of the weight as it was packed: outputs start .. stop, float32 [stop - start, H]."""
        return self.embed(torch.arange(start, stop), linear)

    def embed(self, token_ids_T: Tensor, linear: Linear) -> Tensor:
        """Rows of the (tied) embedding matrix as float32 [T, H]: the start of the residual stream."""
        if isinstance(linear, QuantisedLinear):
            return linear.matrix.rows(token_ids_T)
        return linear.weight[token_ids_T].float()

    def add_rms_norm(
        self, residual_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        """residual (float32, in place) += delta; out = residual / rms(residual) * weight."""
        if delta_TH is not None:
            residual_TH += delta_TH
        scale_T1 = torch.rsqrt(residual_TH.square().mean(-1, keepdim=True) + eps)
        out.copy_(residual_TH * scale_T1 * weight_H)
        return out

    def add_layer_norm(
        self,
        residual_TH: Tensor,
        delta_TH: Tensor | None,
        weight_H: Tensor,
        bias_H: Tensor,
        eps: float,
        out: Tensor,
    ) -> Tensor:
        """As `add_rms_norm`, but LayerNorm: the mean is taken off first, and a bias added last."""
        if delta_TH is not None:
            residual_TH += delta_TH
        return out.copy_(F.layer_norm(residual_TH, weight_H.shape, weight_H, bias_H, eps))

    def rms_norm(self, x_TN: Tensor, first: int, count: int, weight_D: Tensor, eps: float) -> None:
        """Normalise in place `count` vectors of D in every row, from the `first` on: query or key heads, or all of it."""
        dim = len(weight_D)
        x = x_TN[:, first * dim : (first + count) * dim].view(len(x_TN), count, dim)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x.copy_((wide * scale * weight_D).to(x.dtype))

    def add(self, x_TN: Tensor, y_TN: Tensor) -> None:
        """x += y"""
        x_TN += y_TN

    def gelu(self, up_TN: Tensor, out: Tensor | None = None) -> Tensor:
        """gelu, in its form with tanh, [T, N]."""
        return _into(out, F.gelu(up_TN.float(), approximate="tanh").to(up_TN.dtype))

    def gelu_mul(self, gate_up_TN: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, 2N] -> gelu(first half) * second half, [T, N]."""
        gate, up = gate_up_TN.float().chunk(2, dim=-1)
        return _into(out, (F.gelu(gate, approximate="tanh") * up).to(gate_up_TN.dtype))

    def silu_mul(self, gate_up_TN: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, 2N] -> silu(first half) * second half, [T, N]."""
        gate, up = gate_up_TN.float().chunk(2, dim=-1)
        return _into(out, (F.silu(gate) * up).to(gate_up_TN.dtype))

    def rope_store(
        self,
        qkv_TN: Tensor,
        batch: Batch,
        cosine_PD: Tensor,
        sine_PD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        heads: int,
    ) -> None:
        """Rotate q and k in place (rotate-half; tables [P, R/2], the first R of a head); write k and v into their pages.

        Pages: k_cache [blocks, kv heads, D, BLOCK] (keys as columns), v_cache [blocks, kv heads, BLOCK, D].
        """
        kv_heads, dim = k_cache.shape[1], k_cache.shape[2]
        x = qkv_TN.view(qkv_TN.shape[0], heads + 2 * kv_heads, dim)
        part = 2 * cosine_PD.shape[1]
        rotated = x[:, : heads + kv_heads, :part].float()
        cosine, sine = cosine_PD[batch.positions][:, None], sine_PD[batch.positions][:, None]
        first, second = rotated.chunk(2, dim=-1)
        x[:, : heads + kv_heads, :part] = torch.cat(
            [first * cosine - second * sine, second * cosine + first * sine], -1
        ).to(x.dtype)
        block, offset = batch.kv_slots.long() // BLOCK, batch.kv_slots.long() % BLOCK
        k_cache[block, :, :, offset] = x[:, heads : heads + kv_heads]
        v_cache[block, :, offset] = x[:, heads + kv_heads :]

    def attention(
        self,
        qkv_TN: Tensor,
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
        heads: int,
        window: int | None,
        out: Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of every row over its sequence's pages; a window counts the position itself. [T, heads*D].

        Scores are multiplied with `scale` (D**-0.5 if None) and, with a softcap c, become c * tanh(score / c).
        """
        kv_heads, dim = k_cache.shape[1], k_cache.shape[2]
        q = qkv_TN.view(qkv_TN.shape[0], heads + 2 * kv_heads, dim)[:, :heads]
        if out is None:
            out = torch.empty(q.shape[0], heads * dim, dtype=qkv_TN.dtype)
        starts = batch.query_start.tolist()
        for s, context in enumerate(batch.context.tolist()):
            rows = slice(starts[s], starts[s + 1])
            table = batch.tables[s, : -(-context // BLOCK)].long()
            k = k_cache[table].permute(1, 0, 3, 2).reshape(kv_heads, -1, dim)[:, :context]
            v = v_cache[table].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :context]
            seen = torch.arange(context)[None] <= batch.positions[rows, None]
            if window is not None:
                seen &= torch.arange(context)[None] > batch.positions[rows, None] - window
            repeat = heads // kv_heads
            k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
            queries = q[rows].transpose(0, 1)
            if softcap is None:
                attended = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen, scale=scale)
            else:
                scores = queries.float() @ k.float().transpose(1, 2) * (scale or dim**-0.5)
                scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
                attended = (scores.softmax(-1) @ v.float()).to(v.dtype)
            out[rows] = attended.transpose(0, 1).reshape(-1, heads * dim)
        return out

    def lora(self, x_TH: Tensor, y_TN: Tensor, batch: Batch, group: LoraGroup) -> None:
        """y[row, slice] = y[row, slice] * scale + bias + B(A x[row]) for the slot of every row's segment, in place."""
        for slot, start, end in zip(
            batch.segment_slot.tolist(), batch.segment_start.tolist(), batch.segment_end.tolist(), strict=True
        ):
            for slice_index, entry in enumerate(group.entries[slot]):
                if entry is None:
                    continue
                offset, size = int(group.offsets[slice_index]), int(group.sizes[slice_index])
                y = y_TN[start:end, offset : offset + size]
                result = y.float()
                if entry.affine is not None:
                    result = result * entry.affine[0] + entry.affine[1]
                if entry.a is not None and entry.b is not None:
                    result = result + (x_TH[start:end].float() @ entry.a.float().T) @ entry.b.float()
                y.copy_(result.to(y.dtype))


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
