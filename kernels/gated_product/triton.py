# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""The gated product on the GPU, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.blocks import check_tensor
from kernels.dependent_launch import dependent_launch, let_next_kernel_start, wait_for_kernel_before

TILE = 1024
COMPILER_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _gated_product_kernel(gate_up, out, size, TILE: tl.constexpr, DEPENDENT: tl.constexpr):
    wait_for_kernel_before(DEPENDENT)
    let_next_kernel_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # silu(x) = x / (1 + e^-x), rounded as PyTorch rounds it before the product; e^-|x| does not overflow
    small = tl.exp(-tl.abs(wide))
    activated = (wide * tl.where(wide >= 0, 1.0, small) / (1.0 + small)).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * size + column, product.to(gate.dtype), mask=inside)


def gated_product(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.blocks.GatedProduct`."""
    check_tensor("gate_up", gate_up, (None, None))
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if rows:
        _gated_product_kernel[(rows, triton.cdiv(size, TILE))](
            gate_up, out, size, TILE=TILE, **dependent_launch(gate_up.device), **COMPILER_OPTIONS
        )
    return out
