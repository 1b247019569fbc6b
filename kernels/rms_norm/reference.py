"""RMS norm in plain PyTorch, on any device."""

from __future__ import annotations

import torch


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.blocks.RmsNorm`; any number of leading dimensions."""
    wide = hidden.float()
    # x / sqrt(mean(x²) + eps)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(hidden.dtype) * normed.to(hidden.dtype)
