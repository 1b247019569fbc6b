# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Programmatic dependent launch of Triton kernels (CUDA C++ Programming Guide, from compute capability 9.0 on): the
programs of a kernel are placed while the last ones of the kernel before still run, and wait for them when they have to.

Every kernel that takes part waits before it lets its own successor start. So whatever was written two kernels ago may
be read before the wait, and nothing may be written before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FIRST_CAPABILITY = 9


@triton.jit
def wait_for_kernel_before(DEPENDENT: tl.constexpr):
    """Returns when the kernel before has ended and its results can be read; then the next one's programs may be placed
    beside those of this one.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """What a launch on `device` is given: the kernel's DEPENDENT and, where it is set, the launch's own attribute."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < FIRST_CAPABILITY:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
