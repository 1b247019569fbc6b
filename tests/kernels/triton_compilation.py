"""Compiles the Triton kernels for GPUs that need not be there: test_triton.py runs this in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kernels.kv_compaction import triton as compaction
from kernels.packed_linear import triton as linear
from kernels.packed_linear.tiling import choose_gated_tiling, choose_linear_tiling
from kernels.rms_norm import triton as norm
from kernels.rotated_write import triton as write
from kernels.tree_attention.own_entries_kernel import own_entries_kernel
from kernels.tree_attention.split_kernel import split_kernel
from kernels.tree_attention.tiling import MIN_DOT, OWN_LAG, choose_tiling, own_warps, stages, warps
from kernels.tree_attention.triton import COMPILER_OPTIONS, JOIN_CHUNK
from kernels.tree_growth import children as child_kernels
from kernels.tree_growth import triton as growth

AMPERE, HOPPER = 86, 90
# What a block may use, in bytes.
SHARED_MEMORY = {AMPERE: 99 * 1024, HOPPER: 227 * 1024}
# Bytes of registers that a thread may spill, by any version of the compiler. The float32 kernels, which use no tensor
# cores, are not held to it.
MAX_SPILLED = 256
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_kernel(
    kernel: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, int],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 2,
) -> CompiledKernel:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # What a launch finds out by itself: torch's allocations are aligned, and aligned loads are vectorised.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*" or name in ("outputs", "inputs")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {**COMPILER_OPTIONS, "num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(compiled: CompiledKernel, folder: Path) -> int:
    """What a thread keeps on its stack, by the dump of the tool that Triton brings along."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    stacks = re.findall(r"STACK:(\d+)", done.stdout)
    assert stacks
    return max(map(int, stacks))


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "dtype", "capability"),
    [
        (1, 32, 8, 128, "bf16", HOPPER),
        (16, 32, 8, 128, "bf16", HOPPER),
        (64, 32, 8, 128, "bf16", HOPPER),
        (64, 32, 32, 128, "bf16", AMPERE),
        (64, 32, 8, 64, "bf16", AMPERE),
        (16, 32, 8, 128, "fp32", AMPERE),
        (64, 8, 1, 256, "fp32", AMPERE),
        (9, 9, 3, 80, "fp16", AMPERE),
    ],
)
def test_attention_compiles_and_fits(
    rows: int, heads: int, kv_heads: int, head_dim: int, dtype: str, capability: int, tmp_path: Path
) -> None:
    dim_padded = triton.next_power_of_2(head_dim)
    tiling = choose_tiling(rows, 1, heads, kv_heads, dim_padded * ELEMENT_BYTES[dtype])
    group = heads // kv_heads
    group_padded = triton.next_power_of_2(group)
    types = dict.fromkeys(["query", "keys", "values"], f"*{dtype}")
    types |= dict.fromkeys(["block_tables", "row_sequences", "prefix_lengths"], "*i32")
    types |= {"masks": "*i64", "partial": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
    types |= {"rows": "i32", "max_blocks": "i32", "scale": "fp32"}
    of_own = {"out": f"*{dtype}", "max_splits": "i32"}
    tile_lines = max(MIN_DOT, tiling.tile_rows * group_padded)
    constants = {
        "BLOCK_SIZE": 16,
        "WORDS": 1,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "DIM_PADDED": dim_padded,
        "LEAST_SPLIT": tiling.splits.least,
        "DOUBLINGS": tiling.splits.doublings,
        "PARTS": tiling.splits.parts,
        "OWN_LAG": OWN_LAG,
        "DEPENDENT": capability >= HOPPER,
    }
    of_split = {
        "GROUP_PADDED": group_padded,
        "TILE_ROWS": tiling.tile_rows,
        "TILE_M": tile_lines,
        "TILE_KEYS": tiling.tile_keys,
    }
    chosen = warps(tile_lines), stages(ELEMENT_BYTES[dtype])
    own_chosen = own_warps(dim_padded * ELEMENT_BYTES[dtype]), 1
    for compiled in (
        compile_kernel(split_kernel, types, constants | of_split, capability, *chosen),
        compile_kernel(
            own_entries_kernel,
            types | of_own,
            constants | {"OWN_KEYS": 2 * OWN_LAG, "CHUNK": JOIN_CHUNK},
            capability,
            *own_chosen,
        ),
    ):
        assert "cubin" in compiled.asm
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]
        assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == (capability >= HOPPER)
        if dtype != "fp32":
            assert spilled_bytes(compiled, tmp_path) <= MAX_SPILLED


@pytest.mark.parametrize(
    ("rows", "outputs", "dtype", "capability", "gated"),
    [
        (1, 4096, "bf16", HOPPER, False),
        (64, 32000, "fp16", HOPPER, False),
        (64, 4096, "bf16", AMPERE, False),
        (4096, 32000, "bf16", HOPPER, False),
        (4096, 32000, "fp16", AMPERE, False),
        (20, 11008, "fp16", HOPPER, True),
        (64, 11008, "bf16", AMPERE, True),
        (4096, 11008, "bf16", HOPPER, True),
        (4096, 11008, "bf16", AMPERE, True),
    ],
)
def test_linear_compiles_and_fits(
    rows: int, outputs: int, dtype: str, capability: int, gated: bool, tmp_path: Path
) -> None:
    choose = choose_gated_tiling if gated else choose_linear_tiling
    tiling = choose(rows, outputs, ELEMENT_BYTES[dtype], SHARED_MEMORY[capability])
    types = dict.fromkeys(["x", "weight", "bias", "out"], f"*{dtype}")
    types |= dict.fromkeys(["rows", "outputs", "inputs"], "i32")
    constants = {
        "WHOLE": True,
        "BIASED": not gated,
        "ADDED": not gated,
        "GATED": gated,
        "TILE_ROWS": tiling.rows,
        "TILE_OUTPUTS": tiling.outputs // 2 if gated else tiling.outputs,
        "TILE_INPUTS": tiling.inputs,
        "DEPENDENT": capability >= HOPPER,
    }
    compiled = compile_kernel(linear._linear_kernel, types, constants, capability, tiling.warps, tiling.stages)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    assert ("wgmma" in compiled.asm["ptx"]) == (capability == HOPPER)
    assert spilled_bytes(compiled, tmp_path) <= MAX_SPILLED


def test_what_changes_from_step_to_step_is_not_compiled_for() -> None:
    """Else a step of one row, whose number is a constant to Triton, is another program than the others."""
    varying = {
        split_kernel: {"rows", "max_blocks"},
        own_entries_kernel: {"rows", "max_blocks", "max_splits"},
        linear._linear_kernel: {"rows"},
        compaction._kv_compaction_kernel: {"moves"},
    }
    for kernel, names in varying.items():
        assert {parameter.name for parameter in kernel.params if parameter.do_not_specialize} == names
    views = {
        split_kernel: {"block_tables", "row_sequences", "prefix_lengths", "masks"},
        own_entries_kernel: {"block_tables", "row_sequences", "prefix_lengths", "masks"},
        compaction._kv_compaction_kernel: {"sources", "targets"},
        write._rotated_write_kernel: {"slots"},
    }
    for kernel, names in views.items():
        assert {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment} == names


def test_compaction_compiles() -> None:
    types = {"cache": "*bf16", "sources": "*i64", "targets": "*i64", "moves": "i32", "slots": "i32", "slot_size": "i32"}
    constants = {"MOVES": compaction.MAX_MOVES, "CHUNK": compaction.CHUNK}
    assert "cubin" in compile_kernel(compaction._kv_compaction_kernel, types, constants, 90).asm


def test_the_fused_operations_compile() -> None:
    types = {"hidden": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"}
    assert (
        "cubin"
        in compile_kernel(
            norm._rms_norm_kernel, types, {"SIZE": 4096, "PADDED": 4096, "DEPENDENT": True}, HOPPER, 8
        ).asm
    )
    types = dict.fromkeys(["qkv", "query", "keys", "values", "query_norm", "key_norm"], "*bf16")
    types |= {"slots": "*i64", "cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    sizes = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "HALF_PADDED": 64, "HEAD_TILE": write.HEAD_TILE}
    for capability, normed in ((AMPERE, 0), (HOPPER, 1)):
        constants = sizes | {"NORMED": normed, "DEPENDENT": capability == HOPPER}
        assert "cubin" in compile_kernel(write._rotated_write_kernel, types, constants, capability).asm


# Triton's types of what a launch gives to the kernels of tree growth.
GROWTH_TYPES = {
    "*fp64": "above temperature scale maxima confidences kept_confidences out_confidences floor",
    "*fp32": "logits sums",
    "*i64": "noise_keys noisy keys token_ids kept_tokens kept_parents kept_slots above_slots nodes depth out_tokens "
    "out_parents out_slots out_rows slots rows above_masks lengths out_masks out_positions out_cache_slots",
    "*i32": "block_tables out_prefixes",
    "i32": "vocab width levels level children kept beam blocks scratch_slot",
}


@pytest.mark.parametrize(("kept", "vocab", "capability"), [(16, 4096, HOPPER), (64, 128_256, AMPERE)])
def test_tree_growth_compiles_and_fits(kept: int, vocab: int, capability: int, tmp_path: Path) -> None:
    types = {name: kind for kind, names in GROWTH_TYPES.items() for name in names.split()}
    tile = child_kernels.tile_of(vocab, kept)
    tiles = -(-vocab // tile)
    chunk = min(child_kernels.MAX_TILE, triton.next_power_of_2(tiles * kept))
    padded = triton.next_power_of_2(tiles)
    children = {"NOISY": 1, "BEST": kept, "TILES": tiles, "TILES_PADDED": padded, "CHUNK": chunk}
    frontier = {"BLOCK_SIZE": 16, "WORDS": 4, "KEPT_PADDED": kept, "BEAM_PADDED": 8}
    for kernel, constants, size in (
        (child_kernels._tile_kernel, {"NOISY": 1, "TILE": tile, "BEST": kept}, tile),
        (child_kernels._children_kernel, children, chunk),
        (growth._keep_kernel, {"RANKED": growth.RANKED, "COMPARED": growth.COMPARED}, 4096),
        (growth._frontier_kernel, frontier, child_kernels.MIN_TILE),
    ):
        own = {name: types[name] for name in kernel.arg_names if name in types}
        compiled = compile_kernel(kernel, own, constants, capability, child_kernels.compiler_options(size)["num_warps"])
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]
        assert spilled_bytes(compiled, tmp_path) <= MAX_SPILLED
