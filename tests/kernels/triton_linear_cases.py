"""The linear layers in Triton, on CUDA or in Triton's interpreter: test_triton.py runs both, see triton_cases.py."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from kernels.packed_linear.tiling import LinearTiling
from kernels.packed_linear.torch import TorchGatedLinear
from kernels.packed_linear.triton import TritonGatedLinear, TritonLinear, _linear_kernel

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_the_kernel_runs_where_this_file_says() -> None:
    assert isinstance(_linear_kernel, InterpretedFunction) == INTERPRETED


# inputs and outputs that fill no tile, several of each
LINEARS = [(16, 8), (257, 130), (640, 200)] if INTERPRETED else [(16, 8), (100, 33), (128, 64), (257, 130), (640, 200)]
LINEAR_DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
LINEAR_TILINGS = [
    None,
    LinearTiling(16, 64, 128, 4, 2),
    LinearTiling(32, 32, 32, 4, 2),
    LinearTiling(64, 128, 64, 8, 2),
    LinearTiling(128, 64, 64, 4, 3),
]


@pytest.mark.parametrize("tiling", LINEAR_TILINGS, ids=str)
@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), LINEARS)
def test_linear_equals_torch(inputs: int, outputs: int, dtype: torch.dtype, tiling: LinearTiling | None) -> None:
    weight, bias = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype), torch.randn(outputs).to(dtype)
    x, target = torch.randn(37, inputs).to(dtype), torch.randn(37, outputs).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    linear = TritonLinear(weight.to(DEVICE), bias.to(DEVICE), dtype, tiling)
    bare = TritonLinear(weight.to(DEVICE), None, dtype, tiling)
    tolerance = TOLERANCE[dtype]
    assert linear(x.to(DEVICE)).dtype == dtype
    torch.testing.assert_close(linear(x.to(DEVICE)).cpu().double(), expected, atol=tolerance, rtol=tolerance)
    unrounded = bare.unrounded(x.to(DEVICE))
    assert unrounded.dtype == torch.float32
    torch.testing.assert_close(unrounded.cpu().double(), expected - bias.double(), atol=1e-5, rtol=1e-5)
    added = target.to(DEVICE, copy=True)
    assert linear.add_to(added, x.to(DEVICE)) is added
    torch.testing.assert_close(added.cpu().double(), target.double() + expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), LINEARS if INTERPRETED else [*LINEARS, (4096, 4096), (2048, 20000)])
def test_a_row_of_a_linear_layer_does_not_depend_on_the_others(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """On a GPU to the bit; the interpreter's products are NumPy's, which promises nothing."""
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype).to(DEVICE)
    x = torch.randn(700, inputs).to(dtype).to(DEVICE)
    linear = TritonLinear(weight, None, dtype)
    alone = torch.cat([linear.unrounded(x[row : row + 1]) for row in range(3)])
    for rows in (3, 17, 40, 65) if INTERPRETED else (3, 16, 17, 40, 64, 65, 200, 700):
        together = linear.unrounded(x[:rows])[:3]
        if INTERPRETED:
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(together, alone), f"{rows} rows"


GATED_TILINGS = [
    None,
    LinearTiling(16, 128, 64, 4, 2),
    LinearTiling(32, 64, 32, 4, 2),
    LinearTiling(128, 128, 64, 8, 2),
]


@pytest.mark.parametrize("tiling", GATED_TILINGS, ids=str)
@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize(("inputs", "inner"), LINEARS)
def test_gated_linear_equals_torch(inputs: int, inner: int, dtype: torch.dtype, tiling: LinearTiling | None) -> None:
    gate_up = (3 * torch.randn(2 * inner, inputs) * inputs**-0.5).to(dtype)
    x = torch.randn(37, inputs).to(dtype)
    gated = TritonGatedLinear(gate_up.to(DEVICE), dtype, tiling)
    actual = gated(x.to(DEVICE))
    assert actual.dtype == dtype
    expected = TorchGatedLinear(gate_up, torch.float32)(x.float())
    torch.testing.assert_close(actual.cpu().float(), expected, atol=4 * TOLERANCE[dtype], rtol=4 * TOLERANCE[dtype])
    if not INTERPRETED:
        assert torch.equal(actual[5:6], gated(x[5:6].to(DEVICE)))
        assert torch.equal(actual[5], gated(x.repeat(20, 1).to(DEVICE))[5 + 37 * 7])


def test_gates_of_extreme_values_are_finite() -> None:
    gate_up = torch.tensor([[900.0], [-900.0], [0.0], [2.0], [3.0], [4.0]], dtype=torch.float16)
    x = torch.ones(1, 1, dtype=torch.float16)
    actual = TritonGatedLinear(gate_up.to(DEVICE), torch.float16)(x.to(DEVICE)).cpu()
    assert torch.equal(actual.float(), torch.tensor([[1800.0, 0.0, 0.0]]))


def test_what_a_linear_layer_refuses() -> None:
    weight = torch.randn(8, 4, device=DEVICE)
    with pytest.raises(ValueError, match="float32"):
        TritonLinear(weight, None, torch.float32)
    linear = TritonLinear(weight, None, torch.float16)
    with pytest.raises(ValueError, match=r"\[any, 4\]"):
        linear(torch.randn(2, 5, device=DEVICE).half())
    assert linear(weight[:0, :4].half()).shape == (0, 8)
