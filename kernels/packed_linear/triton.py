# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Linear and gated linear layers on the GPU, in Triton, whose rows do not depend on each other.

The weights are the left side of the product, the rows are the columns of its result: so few rows cost few columns, and
the weights, which a small step waits for, are read once and by all multiprocessors. Each result is one chain of tensor
core instructions over the inputs, from the first to the last. Its order does not follow the tile that it lies in, nor
the tile the other rows' contents: the bits of a row are those that it has alone.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.blocks import check_tensor
from kernels.dependent_launch import dependent_launch, wait_for_kernel_before
from kernels.packed_linear.tiling import LinearTiling, choose_gated_tiling, choose_linear_tiling

COMPILER_OPTIONS = {"enable_fp_fusion": False}
# The system keeps so many bytes of each program's (CUDA C++ Programming Guide, from compute capability 8.0 on).
RESERVED_SHARED_MEMORY = 1024
INTERPRETERS_SHARED_MEMORY = 227 * 1024  # a Hopper's


# Steps have any number of rows; what is compiled for a new one keeps requests waiting.
@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # [rows, inputs]
    weight,  # [outputs, inputs]; where GATED, of the gate, and behind it as much of the up projection
    bias,  # [outputs], where BIASED
    out,  # [rows, outputs], added to where ADDED
    rows,
    outputs,
    inputs,
    WHOLE: tl.constexpr,  # whether inputs is a multiple of TILE_INPUTS
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_kernel_before(DEPENDENT)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    column = tl.arange(0, TILE_INPUTS)
    row_ok, output_ok = row < rows, output < outputs
    weights = weight + output.to(tl.int64)[:, None] * inputs + column[None, :]
    lines = x + row.to(tl.int64)[:, None] * inputs + column[None, :]
    up_weights = weight + (outputs + output).to(tl.int64)[:, None] * inputs + column[None, :]
    result = tl.zeros([TILE_OUTPUTS, TILE_ROWS], tl.float32)
    up = tl.zeros([TILE_OUTPUTS, TILE_ROWS], tl.float32)
    for first in range(0, inputs, TILE_INPUTS):
        weights_ok, lines_ok = output_ok[:, None], row_ok[:, None]
        if not WHOLE:
            weights_ok &= (first + column < inputs)[None, :]
            lines_ok &= (first + column < inputs)[None, :]
        w = tl.load(weights + first, mask=weights_ok, other=0.0)
        line = tl.load(lines + first, mask=lines_ok, other=0.0)
        result = tl.dot(w, tl.trans(line), result)
        if GATED:
            up = tl.dot(tl.load(up_weights + first, mask=weights_ok, other=0.0), tl.trans(line), up)
    if GATED:
        # silu(x) = x / (1 + e^-x), rounded as PyTorch's operations round; e^-|x| does not overflow
        kind = x.dtype.element_ty
        gate = result.to(kind).to(tl.float32)
        small = tl.exp(-tl.abs(gate))
        activated = (gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small)).to(kind)
        result = activated.to(tl.float32) * up.to(kind).to(tl.float32)
    result = tl.trans(result)
    if BIASED:
        result += tl.load(bias + output, mask=output_ok, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    inside = row_ok[:, None] & output_ok[None, :]
    if ADDED:
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


class TritonLinear:
    """`kernels.blocks.Linear` with bfloat16 or float16 weights and activations; sums are float32 and rounded once.

    weight: [out, in], kept where it is.
    tiling: None chooses by shape.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        tiling: LinearTiling | None = None,
    ) -> None:
        self._weight = _half_precision(weight, dtype)
        self._bias = None if bias is None else bias.to(dtype)
        self._tiling = tiling

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, x.new_empty(len(x), len(self._weight)))

    def unrounded(self, x: torch.Tensor) -> torch.Tensor:
        """The result in float32, as it was summed."""
        return self._multiply(x, x.new_empty(len(x), len(self._weight), dtype=torch.float32))

    def add_to(self, target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """target += x weightᵀ + bias: the residual costs no launch of its own and is rounded once, with the product."""
        return self._multiply(x, target, added=True)

    def _multiply(self, x: torch.Tensor, out: torch.Tensor, *, added: bool = False) -> torch.Tensor:
        outputs, inputs = self._weight.shape
        check_tensor("x", x, (None, inputs), self._weight.dtype)
        check_tensor("out", out, (len(x), outputs))
        tiling = self._tiling or choose_linear_tiling(len(x), outputs, x.element_size(), _shared_memory(x.device))
        _launch(x, self._weight, self._bias, out, tiling, added=added)
        return out


class TritonGatedLinear:
    """`kernels.blocks.GatedLinear` with bfloat16 or float16 weights and activations, in one launch.

    gate_up: [2 * inner, in], kept where it is.
    tiling: None chooses by shape; half of its outputs are the gate's.
    """

    def __init__(self, gate_up: torch.Tensor, dtype: torch.dtype, tiling: LinearTiling | None = None) -> None:
        self._weight = _half_precision(gate_up, dtype)
        self._tiling = tiling

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        inner, inputs = self._weight.shape[0] // 2, self._weight.shape[1]
        check_tensor("x", x, (None, inputs), self._weight.dtype)
        out = x.new_empty(len(x), inner)
        tiling = self._tiling or choose_gated_tiling(len(x), inner, x.element_size(), _shared_memory(x.device))
        _launch(x, self._weight, None, out, tiling, gated=True)
        return out


def _half_precision(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"activations of {dtype}; the Triton layers take bfloat16 or float16")
    return weight.to(dtype).contiguous()


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiling: LinearTiling,
    *,
    added: bool = False,
    gated: bool = False,
) -> None:
    rows, outputs = out.shape
    if rows == 0:
        return
    tile_outputs = tiling.outputs // 2 if gated else tiling.outputs
    _linear_kernel[(triton.cdiv(rows, tiling.rows), triton.cdiv(outputs, tile_outputs))](
        x,
        weight,
        x if bias is None else bias,
        out,
        rows,
        outputs,
        weight.shape[1],
        WHOLE=weight.shape[1] % tiling.inputs == 0,
        BIASED=bias is not None,
        ADDED=added,
        GATED=gated,
        TILE_ROWS=tiling.rows,
        TILE_OUTPUTS=tile_outputs,
        TILE_INPUTS=tiling.inputs,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **dependent_launch(x.device),
        **COMPILER_OPTIONS,
    )


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program on the device may have."""
    if device.type != "cuda":
        return INTERPRETERS_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - RESERVED_SHARED_MEMORY
