"""The kernels of cpu.c: compiled with the system's C compiler on first use, cached, called through ctypes.

Every method means what its twin in `reference.py` says. Calls release the GIL and run on torch's OpenMP threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kernels.reference import Linear, LoraGroup, ReferenceKernels

SOURCES = [Path(__file__).with_name("cpu.c"), Path(__file__).with_name("ops.c")]
FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
]
PANEL = 32
"""Outputs of one packed panel of a bfloat16 weight."""


class CompileError(Exception):
    """No compiler, or it failed; the message is its own."""


def compile_kernels() -> Path:
    """The shared library for this machine, built if it is not cached yet.

    Raises:
        CompileError: with the reason, when it cannot be built.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompileError("no C compiler (cc, gcc or clang) on the path")
    flags = [flag for flag in FLAGS if platform.machine() == "x86_64" or not flag.startswith("-mprefer")]
    key = hashlib.sha256(" ".join([compiler, *flags, _cpu_flags()]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraland"
    library = cache / f"cpu-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "cpu.so"
            command = [compiler, *flags, "-Wno-psabi", "-o", str(built), str(SOURCES[0]), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise CompileError(f"{' '.join(command)}: {done.stderr.strip()[-800:]}")
            built.rename(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(str(error)) from error
    return library


def _cpu_flags() -> str:
    """What `-march=native` depends on, so that a cache shared by different machines stays right."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


class NativeKernels(ReferenceKernels):
    """cpu.c for the model's dtype; inherits the torch form of what it does not speed up."""

    name = "native"

    def __init__(self, dtype: torch.dtype) -> None:
        library = ctypes.CDLL(str(compile_kernels()))
        suffix = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self.packs = dtype == torch.bfloat16 and bool(library.has_gemm_bf16())
        pointer, integer, wide, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

        def function(name: str, *arguments: type) -> Callable[..., None]:
            found = getattr(library, name)
            found.argtypes, found.restype = arguments, None
            return found

        self._gemm = function(
            "gemm_bf16", pointer, integer, integer, pointer, integer, pointer, pointer, integer
        )
        self._norm = function(f"add_rms_norm_{suffix}", *[pointer] * 4, integer, integer, real)
        self._silu = function(f"silu_mul_{suffix}", pointer, pointer, integer, integer)
        self._rope = function(f"rope_store_{suffix}", *[pointer] * 7, *[integer] * 4)
        self._attention = function(
            f"attention_{suffix}", *[pointer] * 7, *[integer] * 5, real, integer, integer
        )
        self._lora = function(
            f"lora_{suffix}",
            pointer,
            integer,
            pointer,
            wide,
            integer,
            *[pointer] * 3,
            integer,
            *[pointer] * 5,
        )

    def pack_linear(self, weight_NH: Tensor, bias_N: Tensor | None) -> Linear:
        outputs, inputs = weight_NH.shape
        if not self.packs or inputs % 2:
            return super().pack_linear(weight_NH, bias_N)
        padded = torch.nn.functional.pad(weight_NH, (0, 0, 0, -outputs % PANEL))
        panels = padded.view(-1, PANEL, inputs // 2, 2).transpose(1, 2).contiguous()
        return Linear(panels, None if bias_N is None else bias_N.float().contiguous(), outputs)

    def linear(self, x_TH: Tensor, linear: Linear) -> Tensor:
        if linear.weight.dim() == 2:
            return super().linear(x_TH, linear)
        return self._multiply(x_TH, linear, torch.empty(x_TH.shape[0], linear.num_outputs, dtype=x_TH.dtype))

    def logits(self, x_TH: Tensor, linear: Linear) -> Tensor:
        if linear.weight.dim() == 2:
            return super().logits(x_TH, linear)
        return self._multiply(x_TH, linear, torch.empty(x_TH.shape[0], linear.num_outputs))

    def _multiply(self, x_TH: Tensor, linear: Linear, out_TN: Tensor) -> Tensor:
        rows, inputs = x_TH.shape
        bias = None if linear.bias is None else linear.bias.data_ptr()
        weight, wide = linear.weight.data_ptr(), out_TN.dtype == torch.float32
        self._gemm(x_TH.data_ptr(), rows, inputs, weight, linear.num_outputs, bias, out_TN.data_ptr(), wide)
        return out_TN

    def embed(self, token_ids_T: Tensor, linear: Linear) -> Tensor:
        if linear.weight.dim() == 2:
            return super().embed(token_ids_T, linear)
        rows = linear.weight[token_ids_T // PANEL, :, token_ids_T % PANEL]
        return rows.reshape(len(token_ids_T), -1).float()

    def add_rms_norm(
        self, residual_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        delta = None if delta_TH is None else delta_TH.data_ptr()
        rows, width = residual_TH.shape
        self._norm(residual_TH.data_ptr(), delta, weight_H.data_ptr(), out.data_ptr(), rows, width, eps)
        return out

    def silu_mul(self, gate_up_TN: Tensor) -> Tensor:
        rows, width = gate_up_TN.shape
        out = torch.empty(rows, width // 2, dtype=gate_up_TN.dtype)
        self._silu(gate_up_TN.data_ptr(), out.data_ptr(), rows, width // 2)
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
        _, kv_heads, dim, _ = k_cache.shape
        self._rope(
            qkv_TN.data_ptr(),
            batch.positions.data_ptr(),
            batch.kv_slots.data_ptr(),
            cosine_PD.data_ptr(),
            sine_PD.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            qkv_TN.shape[0],
            heads,
            kv_heads,
            dim,
        )

    def attention(
        self, qkv_TN: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor, heads: int, window: int | None
    ) -> Tensor:
        _, kv_heads, dim, _ = k_cache.shape
        if dim % 16 or dim > 256:
            return super().attention(qkv_TN, batch, k_cache, v_cache, heads, window)
        out = torch.empty(qkv_TN.shape[0], heads * dim, dtype=qkv_TN.dtype)
        self._attention(
            qkv_TN.data_ptr(),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context.data_ptr(),
            batch.tables.data_ptr(),
            batch.tables.shape[1],
            batch.tables.shape[0],
            heads,
            kv_heads,
            dim,
            dim**-0.5,
            window or 0,
            batch.max_context,
        )
        return out

    def lora(self, x_TH: Tensor, y_TN: Tensor, batch: Batch, group: LoraGroup) -> None:
        self._lora(
            x_TH.data_ptr(),
            x_TH.shape[1],
            y_TN.data_ptr(),
            y_TN.shape[1],
            len(batch.segment_slot),
            batch.segment_slot.data_ptr(),
            batch.segment_start.data_ptr(),
            batch.segment_end.data_ptr(),
            len(group.offsets),
            group.offsets.data_ptr(),
            group.sizes.data_ptr(),
            group.a_table.data_ptr(),
            group.b_table.data_ptr(),
            group.ranks.data_ptr(),
        )
