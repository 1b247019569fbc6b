"""The packed linear layer against torch, and its promise about bits."""

from __future__ import annotations

import pytest
import torch

from kernels.native import get_num_threads, set_num_threads
from kernels.packed_linear.native import NativeLinear

# inputs beyond the depth of a panel, odd inputs, outputs that fill no block, one of each
SIZES = [(1, 1), (7, 3), (64, 16), (65, 100), (129, 17), (2051, 33), (512, 272)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).to(dtype)
    offset = torch.randn(outputs) if bias else None
    x = torch.randn(19, inputs)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(NativeLinear(weight, offset)(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_row_does_not_depend_on_the_others(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    linear = NativeLinear(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs))
    x = torch.randn(64, inputs)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(64)])
    for rows in range(1, 65):
        assert torch.equal(linear(x[:rows]), alone[:rows]), f"{rows} rows"
    many = torch.randn(300, inputs)
    many[123:187] = x
    assert torch.equal(linear(many)[123:187], alone)


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
def test_bfloat16_in_memory_changes_no_bit(inputs: int, outputs: int) -> None:
    torch.manual_seed(3)
    weight = torch.randn(outputs, inputs).to(torch.bfloat16)
    x = torch.randn(9, inputs)
    assert torch.equal(NativeLinear(weight)(x), NativeLinear(weight.float())(x))


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
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        NativeLinear(torch.randn(3, 4).half())
