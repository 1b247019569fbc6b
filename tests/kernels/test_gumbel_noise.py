"""The native noise is the noise of speculation/noise.py."""

from __future__ import annotations

import pytest
import torch

from kernels.native.shared_library import load
from kernels.native.structures import pointer
from speculation.noise import gumbel_noise


@pytest.mark.parametrize("size", [1, 3, 8, 31, 4096])
@pytest.mark.parametrize("seed", [0, 1, 5, 2**63, 2**64 - 1])
def test_noise_is_the_references_rounded_to_float(seed: int, size: int) -> None:
    """At most one unit in the last place apart: the double logarithms may differ in their last bit."""
    for position in (0, 1, 77, 4095):
        noise = torch.full((size + 1,), 99.0)
        load().specserve_gumbel_noise(seed, position, size, pointer(noise))
        expected = gumbel_noise(seed, position, size)
        torch.testing.assert_close(noise[:size].double(), expected, rtol=2**-23, atol=1e-15)
        assert noise[size] == 99.0
