"""Weights as int8: symmetric, a scale for each output."""

from __future__ import annotations

import torch

LARGEST = 127


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> int8 [out, in] and float32 scales [out], with weight ≈ scales[:, None] * int8.

    scale = max |row| / 127, so that an element is off by half a scale at most; a row of zeros has the scale 0.
    """
    wide = weight.float()
    scales = wide.abs().amax(1) / LARGEST
    rounded = (wide / scales.where(scales > 0, torch.ones(()))[:, None]).round()
    return rounded.clamp(-LARGEST, LARGEST).to(torch.int8), scales
