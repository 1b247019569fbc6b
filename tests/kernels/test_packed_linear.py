"""The packed linear layer against torch, in every storage, and its promise about bits."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from kernels.native import get_num_threads, multiplies_in_tiles, set_num_threads
from kernels.packed_linear.int8 import quantize
from kernels.packed_linear.native import NativeLinear

# inputs beyond the depth of a panel, odd inputs, outputs that fill no block, one of each
SIZES = [(1, 1), (7, 3), (64, 16), (65, 100), (129, 17), (2051, 33), (512, 272)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def multiplied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What weights of that type multiply, in float64."""
    return (x.bfloat16() if dtype is torch.bfloat16 else x).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).to(dtype)
    offset = torch.randn(outputs) if bias else None
    x = torch.randn(19, inputs)
    bias64 = None if offset is None else offset.double()
    expected = torch.nn.functional.linear(multiplied(x, dtype), weight.double(), bias64)
    torch.testing.assert_close(NativeLinear(weight, offset)(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_int8_equals_its_widened_weights(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs), torch.randn(19, inputs)
    offset = torch.randn(outputs) if bias else None
    values, scales = quantize(weight)
    widened = values.double() * scales.double()[:, None]
    expected = torch.nn.functional.linear(x.double(), widened, None if offset is None else offset.double())
    torch.testing.assert_close(NativeLinear(weight, offset, int8=True)(x).double(), expected, atol=1e-4, rtol=1e-4)


def test_quantization_is_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 40) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    values, scales = quantize(weight.bfloat16())
    assert values.dtype is torch.int8
    assert values.abs().max(1).values.tolist() == [127] * 7 + [0] + [127] * 42
    error = (values.float() * scales[:, None] - weight.bfloat16().float()).abs()
    assert (error <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("storage", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_row_does_not_depend_on_the_others(inputs: int, outputs: int, storage: torch.dtype) -> None:
    torch.manual_seed(1)
    int8 = storage is torch.int8
    weight = torch.randn(outputs, inputs).to(torch.float32 if int8 else storage)
    linear = NativeLinear(weight, torch.randn(outputs), int8=int8)
    x = torch.randn(100, inputs)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(100)])
    for rows in range(1, 101):
        assert torch.equal(linear(x[:rows]), alone[:rows]), f"{rows} rows"
    many = torch.randn(300, inputs)
    many[123:223] = x
    assert torch.equal(linear(many)[123:223], alone)


def test_the_number_of_threads_does_not_matter() -> None:
    torch.manual_seed(2)
    linear = NativeLinear(torch.randn(1000, 300))
    x = torch.randn(5, 300)
    before = get_num_threads()
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        assert get_num_threads() == threads
        results.append(linear(x))
    set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_float16_in_memory_changes_no_bit(inputs: int, outputs: int) -> None:
    torch.manual_seed(3)
    weight = torch.randn(outputs, inputs).half()
    weight.view(-1)[::5] *= 2.0**-20  # subnormal
    x = torch.randn(9, inputs)
    assert torch.equal(NativeLinear(weight)(x), NativeLinear(weight.float())(x))


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_bfloat16_is_summed_up_in_the_order_of_its_instructions(inputs: int, outputs: int) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(9, inputs)

    def chain(order: Iterable[int], sums: torch.Tensor) -> torch.Tensor:
        for k in order:  # a product of two bfloat16 numbers is exact in float32: there is one rounding, as in an fma
            sums = sums + x.bfloat16().float()[:, k, None] * weight.float()[None, :, k]
        return sums

    sums = nothing = torch.zeros(9, outputs)
    if multiplies_in_tiles():
        for first in range(0, inputs, 32):
            end = min(first + 32, inputs)
            sums = sums + (chain(range(first, end, 2), nothing) + chain(range(first + 1, end, 2), nothing))
    else:
        sums = chain([k for first in range(0, inputs, 2) for k in (first + 1, first) if k < inputs], nothing)
    assert torch.equal(NativeLinear(weight)(x), sums)


def test_bfloat16_rounds_what_it_multiplies_to_nearest_even() -> None:
    bits = torch.arange(
        0x3F7F0000, 0x3F830000, 0x111, dtype=torch.int32
    )  # ties among them, and a carry into the exponent
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7F8000, 0x7F800000], dtype=torch.int32)
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x, -x])
    assert torch.equal(NativeLinear(torch.ones(1, 1).bfloat16())(x[:, None])[:, 0], x.bfloat16().float())
    assert NativeLinear(torch.ones(1, 1).bfloat16())(torch.full((1, 1), torch.nan)).isnan().all()
    assert NativeLinear(torch.ones(1, 1).bfloat16())(torch.full((1, 1), 1e-39)).item() == 0  # subnormal


def test_every_float16_widens_exactly() -> None:
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    widened = NativeLinear(halves[:, None])(torch.ones(1, 1))[0]
    torch.testing.assert_close(widened, halves.float(), rtol=0, atol=0, equal_nan=True)


def test_no_rows_give_no_rows() -> None:
    assert NativeLinear(torch.randn(3, 4))(torch.empty(0, 4)).shape == (0, 3)


def test_wrong_operands_are_named() -> None:
    linear = NativeLinear(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); it must be \[any, 4\]"):
        linear(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"x is torch\.float64; it must be torch\.float32"):
        linear(torch.randn(2, 4).double())
    with pytest.raises(ValueError, match=r"call \.contiguous"):
        linear(torch.randn(4, 2).t())
    with pytest.raises(ValueError, match=r"weight is torch\.float64; the native kernels take torch\.float32, "):
        NativeLinear(torch.randn(3, 4).double())
