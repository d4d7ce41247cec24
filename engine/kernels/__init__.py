"""CPU kernels: `reference.py` says in torch what each one means, `native.py` runs them from cpu.c."""

import structlog
import torch

from engine.kernels.native import CompileError, NativeKernels
from engine.kernels.reference import ReferenceKernels

log = structlog.get_logger()


def select_kernels(dtype: torch.dtype, choice: str = "auto") -> ReferenceKernels:
    """The kernels for a dtype: `native`, `torch`, or `auto` (native if it can be compiled). Logs which and why.

    Raises:
        CompileError: when `native` is asked for and cannot be had.
    """
    if choice == "torch":
        log.info("kernels", chosen="torch", reason="configured")
        return ReferenceKernels()
    try:
        kernels = NativeKernels(dtype)
    except CompileError as error:
        if choice == "native":
            raise
        log.warning("kernels", chosen="torch", reason=f"cannot compile the native ones: {error}")
        return ReferenceKernels()
    log.info("kernels", chosen="native", packed_bf16=kernels.packs)
    return kernels
