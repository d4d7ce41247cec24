"""Compiles every Triton kernel for one GPU generation, and prints as JSON the bytes of cubin of each: run by its test."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import triton_lora

LORA = {"slot_ptr": "*i32", "rows_ptr": "*i32", "ranks": "*i32", "bridge_ptr": "*fp32", "plane_size": "i32"}
KERNELS = [
    (
        triton_lora.shrink,
        LORA
        | {"x_ptr": "*bf16", "a_table": "*i64", "x_stride": "i32", "inputs": "i32", "part_inputs": "i32"},
        {"SLICES": 3, "TILES": 4, "BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 128},
    ),
    (
        triton_lora.expand,
        LORA
        | {"y_ptr": "*bf16", "b_table": "*i64", "affine_table": "*i64", "offsets": "*i32", "sizes": "*i32"}
        | {"y_stride": "i32"},
        {"SLICES": 3, "WIDTH": 64, "SPLIT": 8, "BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_N": 128},
    ),
]


def compile_all(capability: int) -> dict[str, int]:
    """By kernel, the bytes of machine code."""
    sizes = {}
    for kernel, types, constants in KERNELS:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        sizes[kernel.__name__] = len(compiled.asm["cubin"])
    return sizes


if __name__ == "__main__":
    json.dump(compile_all(int(sys.argv[1])), sys.stdout)
