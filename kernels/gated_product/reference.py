"""The gated product in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch.nn import functional


def gated_product(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.blocks.GatedProduct`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
