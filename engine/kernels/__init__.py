"""CPU kernels: `reference.py` says in torch what each one means, `native.py` runs them from cpu.c."""

import structlog
import torch

from engine.kernels.library import CompileError
from engine.kernels.native import NativeKernels
from engine.kernels.reference import ReferenceKernels

log = structlog.get_logger()


def select_kernels(
    dtype: torch.dtype, choice: str = "auto", batch_invariant: bool = False
) -> ReferenceKernels:
    """The kernels for a dtype: `native`, `torch`, or `auto` (native if it can be compiled). Logs which and why.

    Raises:
        CompileError: when `native` or batch invariance is asked for and cannot be had.
    """
    if choice == "torch" and batch_invariant:
        raise CompileError('batch_invariant needs the native kernels, but kernels is "torch"')
    if choice == "torch":
        log.info("kernels", chosen="torch", reason="configured")
        return ReferenceKernels()
    try:
        kernels = NativeKernels(dtype)
    except CompileError as error:
        if choice == "native" or batch_invariant:
            raise
        log.warning("kernels", chosen="torch", reason=f"cannot compile the native ones: {error}")
        return ReferenceKernels()
    log.info("kernels", chosen="native", bf16_dot_products=kernels.dots)
    return kernels
