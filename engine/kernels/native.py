"""The kernels of cpu.c, called through ctypes.

Every method means what its twin in `reference.py` says. Calls release the GIL and run on torch's OpenMP threads.
"""

import ctypes
import struct
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.code_panels import CodePanels, fits, pack, unpack_rows
from engine.kernels.library import load_library
from engine.kernels.reference import Linear, LoraGroup, ReferenceKernels
from engine.quant import QuantisedWeight

PANEL = 32
"""Outputs of one packed panel of a weight."""
CALL_WORDS = 16
"""64-bit words of one call: the kernel's address and its arguments; as in cpu.c."""
BATCH_WORDS = 13
"""64-bit words of cpu.c's `Batch`."""


class NativeKernels(ReferenceKernels):
    """cpu.c for the model's dtype; inherits the torch form of what it does not speed up."""

    name = "native"

    def __init__(self, dtype: torch.dtype) -> None:
        library = load_library()
        suffix = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self._dtype = dtype
        self.dots = dtype == torch.bfloat16 and bool(library.has_gemm_bf16())
        """Whether the processor multiplies pairs of bfloat16."""
        self._run = library.run
        self._run.argtypes, self._run.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int), None
        self._threads = torch.get_num_threads()

        def kernel(name: str) -> int:
            return ctypes.cast(getattr(library, f"op_{name}"), ctypes.c_void_p).value or 0

        self._product = kernel(f"product_{suffix}")
        self._product_of_pairs = kernel("gemm_bf16")
        self._product_of_codes = kernel(f"code_product_{suffix}")
        self._norm = kernel(f"add_rms_norm_{suffix}")
        self._layer_norm = kernel(f"add_layer_norm_{suffix}")
        self._rms_norm = kernel(f"rms_norm_{suffix}")
        self._add = kernel(f"add_{suffix}")
        self._silu = kernel(f"silu_mul_{suffix}")
        self._gelu = kernel(f"gelu_{suffix}")
        self._rope = kernel(f"rope_store_{suffix}")
        self._attention = kernel(f"attention_{suffix}")
        self._lora = kernel(f"lora_{suffix}")
        self._batch: Batch | None = None
        self._batch_words = np.zeros(BATCH_WORDS, np.int64)
        self._batch_address = self._batch_words.ctypes.data
        self._recording: list[array | Callable[[Any], object]] | None = None

    def record(self, compute: Callable[[Batch], None], batch: Batch) -> Callable[[Batch], None]:
        """Runs of native kernels become one call each, with one parallel region."""
        self._bind(batch)
        self._recording = parts = []
        try:
            compute(batch)
        finally:
            self._recording = None

        def replay(batch: Batch) -> None:
            self._bind(batch)
            for part in parts:
                if isinstance(part, array):
                    self._run(part.buffer_info()[0], len(part) // CALL_WORDS, self._threads)
                else:
                    part(batch)

        return replay

    def _call(self, kernel: int, *arguments: int) -> None:
        """Run a kernel of cpu.c, or note it down."""
        words = array("q", (kernel, *arguments, *(0,) * (CALL_WORDS - 1 - len(arguments))))
        if self._recording is None:
            self._run(words.buffer_info()[0], 1, self._threads)
        elif self._recording and isinstance(self._recording[-1], array):
            self._recording[-1].extend(words)
        else:
            self._recording.append(words)

    def _call_torch(self, compute: Callable[[Any], object]) -> None:
        """The same for a kernel's torch form."""
        if self._recording is None:
            compute(self._batch)
        else:
            self._recording.append(compute)

    def _bind(self, batch: Batch) -> None:
        """Let the words that kernels read tell of this batch."""
        if batch is self._batch:
            return
        self._batch = batch
        self._batch_words[:] = (
            batch.positions.data_ptr(),
            batch.kv_slots.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context.data_ptr(),
            batch.tables.data_ptr(),
            batch.segment_slot.data_ptr(),
            batch.segment_start.data_ptr(),
            batch.segment_end.data_ptr(),
            len(batch.positions),
            len(batch.context),
            batch.tables.shape[1],
            batch.max_context,
            len(batch.segment_slot),
        )

    def pack_linear(self, weight_NH: Tensor | QuantisedWeight, bias_N: Tensor | None) -> Linear:
        """In panels of 32 outputs: [panel, H, 32], or [panel, H / 2, 32, 2] where pairs are multiplied at once.

        A quantised weight of a shape that quant.c does not take is kept dequantised.
        """
        if not isinstance(weight_NH, Tensor):
            if fits(weight_NH):
                return pack(weight_NH, bias_N)
            weight_NH = weight_NH.dense(self._dtype)
        outputs, inputs = weight_NH.shape
        pairs = 2 if self.dots and inputs % 2 == 0 else 1
        whole, rest = divmod(outputs, PANEL)
        panels = torch.zeros(whole + bool(rest), inputs // pairs, PANEL, pairs, dtype=weight_NH.dtype)
        # Written in place: the matrix is copied once, and an embedding is gigabytes.
        panels[:whole] = weight_NH[: whole * PANEL].view(whole, PANEL, inputs // pairs, pairs).transpose(1, 2)
        if rest:
            panels[whole, :, :rest] = (
                weight_NH[whole * PANEL :].view(rest, inputs // pairs, pairs).transpose(0, 1)
            )
        if pairs == 1:
            panels = panels.squeeze(-1)
        return Linear(panels, None if bias_N is None else bias_N.float().contiguous(), outputs)

    def linear(self, x_TH: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(x_TH.shape[0], linear.num_outputs, dtype=x_TH.dtype)
        return self._multiply(x_TH, linear, out)

    def logits(self, x_TH: Tensor, linear: Linear) -> Tensor:
        return self._multiply(x_TH, linear, torch.empty(x_TH.shape[0], linear.num_outputs))

    def _multiply(self, x_TH: Tensor, linear: Linear, out_TN: Tensor) -> Tensor:
        rows, inputs = x_TH.shape
        if isinstance(linear, CodePanels):
            self._call(
                self._product_of_codes,
                x_TH.data_ptr(),
                rows,
                inputs,
                linear.form,
                linear.weight.data_ptr(),
                linear.scale.data_ptr(),
                linear.num_outputs,
                0 if linear.bias is None else linear.bias.data_ptr(),
                out_TN.data_ptr(),
                out_TN.dtype == torch.float32,
            )
            return out_TN
        self._call(
            self._product if linear.weight.dim() == 3 else self._product_of_pairs,
            x_TH.data_ptr(),
            rows,
            inputs,
            linear.weight.data_ptr(),
            linear.num_outputs,
            0 if linear.bias is None else linear.bias.data_ptr(),
            out_TN.data_ptr(),
            out_TN.dtype == torch.float32,
        )
        return out_TN

    def embed(self, token_ids_T: Tensor, linear: Linear) -> Tensor:
        if isinstance(linear, CodePanels):
            return unpack_rows(linear, token_ids_T)
        panels = linear.weight
        if panels.dim() == 3:
            return panels[token_ids_T // PANEL, :, token_ids_T % PANEL].float()
        return panels[token_ids_T // PANEL, :, token_ids_T % PANEL].flatten(1).float()

    def add_rms_norm(
        self, residual_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        rows, width = residual_TH.shape
        self._call(
            self._norm,
            residual_TH.data_ptr(),
            0 if delta_TH is None else delta_TH.data_ptr(),
            weight_H.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            _bits(eps),
        )
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
        rows, width = residual_TH.shape
        self._call(
            self._layer_norm,
            residual_TH.data_ptr(),
            0 if delta_TH is None else delta_TH.data_ptr(),
            weight_H.data_ptr(),
            bias_H.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            _bits(eps),
        )
        return out

    def rms_norm(self, x_TN: Tensor, first: int, count: int, weight_D: Tensor, eps: float) -> None:
        rows, stride = x_TN.shape
        dim = len(weight_D)
        start = x_TN.data_ptr() + first * dim * x_TN.element_size()
        self._call(self._rms_norm, start, rows, stride, count, dim, weight_D.data_ptr(), _bits(eps))

    def add(self, x_TN: Tensor, y_TN: Tensor) -> None:
        self._call(self._add, x_TN.data_ptr(), y_TN.data_ptr(), *x_TN.shape)

    def gelu(self, up_TN: Tensor, out: Tensor | None = None) -> Tensor:
        return self._activate(up_TN, up_TN.shape[1], False, out)

    def gelu_mul(self, gate_up_TN: Tensor, out: Tensor | None = None) -> Tensor:
        return self._activate(gate_up_TN, gate_up_TN.shape[1] // 2, True, out)

    def _activate(self, x_TN: Tensor, width: int, gated: bool, out: Tensor | None) -> Tensor:
        if out is None:
            out = torch.empty(x_TN.shape[0], width, dtype=x_TN.dtype)
        self._call(self._gelu, x_TN.data_ptr(), out.data_ptr(), x_TN.shape[0], width, gated)
        return out

    def silu_mul(self, gate_up_TN: Tensor, out: Tensor | None = None) -> Tensor:
        rows, width = gate_up_TN.shape
        if out is None:
            out = torch.empty(rows, width // 2, dtype=gate_up_TN.dtype)
        self._call(self._silu, gate_up_TN.data_ptr(), out.data_ptr(), rows, width // 2)
        return out

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
        self._bind(batch)
        _, kv_heads, dim, _ = k_cache.shape
        self._call(
            self._rope,
            qkv_TN.data_ptr(),
            self._batch_address,
            cosine_PD.data_ptr(),
            sine_PD.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            heads,
            kv_heads,
            dim,
            2 * cosine_PD.shape[1],
        )

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
        _, kv_heads, dim, _ = k_cache.shape
        if out is None:
            out = torch.empty(qkv_TN.shape[0], heads * dim, dtype=qkv_TN.dtype)
        if dim % 16 or dim > 256:
            torch_attention = super().attention
            self._bind(batch)
            self._call_torch(
                lambda batch: torch_attention(
                    qkv_TN, batch, k_cache, v_cache, heads, window, out, scale=scale, softcap=softcap
                )
            )
            return out
        self._bind(batch)
        self._call(
            self._attention,
            qkv_TN.data_ptr(),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            self._batch_address,
            heads,
            kv_heads,
            dim,
            _bits(scale or dim**-0.5),
            window or 0,
            _bits(softcap or 0.0),
        )
        return out

    def lora(self, x_TH: Tensor, y_TN: Tensor, batch: Batch, group: LoraGroup) -> None:
        self._bind(batch)
        self._call(
            self._lora,
            x_TH.data_ptr(),
            x_TH.shape[1],
            y_TN.data_ptr(),
            y_TN.shape[1],
            self._batch_address,
            len(group.offsets),
            group.offsets.data_ptr(),
            group.sizes.data_ptr(),
            group.a_table.data_ptr(),
            group.b_table.data_ptr(),
            group.ranks.data_ptr(),
            group.affine_table.data_ptr(),
        )


def _bits(number: float) -> int:
    """A float as cpu.c's REAL reads it."""
    return struct.unpack("q", struct.pack("d", number))[0]
