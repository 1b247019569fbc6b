"""Linear and gated linear layers as PyTorch's libraries compute them, on any device.

A row's bits may depend on the number of rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class TorchLinear:
    """`kernels.blocks.Linear` with activations of `dtype`.

    bfloat16 weights multiply x rounded to bfloat16, also where the rest is float32: as the native layer does.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._rounds = weight.dtype == torch.bfloat16 != dtype
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self._rounded(x), self._weight, self._bias)

    def unrounded(self, x: torch.Tensor) -> torch.Tensor:
        """The result in float32, as it was summed."""
        if x.is_cuda and self._weight.dtype != torch.float32 and self._bias is None:
            return torch.mm(self._rounded(x), self._weight.t(), out_dtype=torch.float32)
        return self(x).float()

    def add_to(self, target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """target += x weightᵀ + bias: the residual costs no launch of its own and is rounded once, with the product."""
        if self._bias is not None:
            target.add_(self._bias)
        return target.addmm_(self._rounded(x), self._weight.t())

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().to(x.dtype) if self._rounds else x


class TorchGatedLinear:
    """`kernels.blocks.GatedLinear` with activations of `dtype`."""

    def __init__(self, gate_up: torch.Tensor, dtype: torch.dtype) -> None:
        self._gate_up = TorchLinear(gate_up, None, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return functional.silu(gate) * up
