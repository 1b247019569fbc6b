"""Compiles the Triton kernels for GPUs that need not be there: test_triton.py runs this in a process of its own."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kernels.kv_compaction import triton as compaction
from kernels.tree_attention import triton as attention
from kernels.tree_attention.triton import COMPILER_OPTIONS, MIN_DOT, choose_tiling

AMPERE, HOPPER = 86, 90
# What a block may use, in bytes.
SHARED_MEMORY = {AMPERE: 99 * 1024, HOPPER: 227 * 1024}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_kernel(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, int], capability: int
) -> CompiledKernel:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=COMPILER_OPTIONS)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "dtype", "capability"),
    [
        (1, 32, 8, 128, "bf16", HOPPER),
        (16, 32, 8, 128, "bf16", HOPPER),
        (16, 32, 8, 128, "fp32", AMPERE),
        (64, 8, 1, 256, "fp32", AMPERE),
        (9, 9, 3, 80, "fp16", AMPERE),
    ],
)
def test_attention_compiles_and_fits(
    rows: int, heads: int, kv_heads: int, head_dim: int, dtype: str, capability: int
) -> None:
    dim_padded = triton.next_power_of_2(head_dim)
    tiling = choose_tiling(rows, 1, heads, kv_heads, dim_padded * ELEMENT_BYTES[dtype], 4096, 132)
    group = heads // kv_heads
    group_padded = triton.next_power_of_2(group)
    types = dict.fromkeys(["query", "keys", "values"], f"*{dtype}")
    types |= dict.fromkeys(["block_tables", "row_sequences", "prefix_lengths"], "*i32")
    types |= {"masks": "*i64", "out": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
    types |= {"rows": "i32", "max_blocks": "i32", "scale": "fp32"}
    constants = {
        "BLOCK_SIZE": 16,
        "WORDS": 1,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "GROUP_PADDED": group_padded,
        "HEAD_DIM": head_dim,
        "DIM_PADDED": dim_padded,
        "TILE_ROWS": tiling.tile_rows,
        "TILE_M": max(MIN_DOT, tiling.tile_rows * group_padded),
        "TILE_KEYS": tiling.tile_keys,
        "SPLITS": tiling.splits,
    }
    compiled = compile_kernel(attention._tree_attention_kernel, types, constants, capability)
    assert "cubin" in compiled.asm
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]


def test_the_small_kernels_compile() -> None:
    types = dict.fromkeys(["partial", "maxima", "sums"], "*fp32") | {"out": "*bf16", "lines": "i32"}
    constants = {"HEAD_DIM": 80, "DIM_PADDED": 128, "SPLITS": 16}
    assert "cubin" in compile_kernel(attention._join_splits_kernel, types, constants, 90).asm
    types = {"cache": "*bf16", "sources": "*i64", "targets": "*i64", "moves": "i32", "slots": "i32", "slot_size": "i32"}
    constants = {"MOVES": compaction.MAX_MOVES, "CHUNK": compaction.CHUNK}
    assert "cubin" in compile_kernel(compaction._kv_compaction_kernel, types, constants, 90).asm
