# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""RMS norm on the GPU, in Triton: one program a row, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.blocks import check_tensor
from kernels.dependent_launch import dependent_launch, wait_for_kernel_before

COMPILER_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _rms_norm_kernel(hidden, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, DEPENDENT: tl.constexpr):
    wait_for_kernel_before(DEPENDENT)
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    place = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(hidden + place, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    # rounded after the normalisation and after the weight, as PyTorch's operations round
    normed = (wide * inverse).to(x.dtype).to(tl.float32)
    tl.store(out + place, (normed * w.to(x.dtype).to(tl.float32)).to(x.dtype), mask=inside)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.blocks.RmsNorm`."""
    check_tensor("hidden", hidden, (None, None))
    rows, size = hidden.shape
    check_tensor("weight", weight, (size,))
    out = torch.empty_like(hidden)
    if rows:
        _rms_norm_kernel[(rows,)](
            hidden,
            weight,
            out,
            eps,
            SIZE=size,
            PADDED=triton.next_power_of_2(size),
            **dependent_launch(hidden.device),
            **COMPILER_OPTIONS,
        )
    return out
