"""The environment of the children: how many threads they compute with, and how long an idle thread spins."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Verifier and speculator take turns on the same cores. An OpenMP thread that spins between two operations of its own
# step wakes at once; one that still spins when the other service computes takes the core from it. The default of GNU
# OpenMP spins for milliseconds.
SPIN_COUNT = 20_000


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment(inherited: Mapping[str, str], threads: int) -> dict[str, str]:
    """`inherited`, with the OpenMP settings that it does not give itself."""
    ours = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(SPIN_COUNT), "PYTHONUNBUFFERED": "1"}
    return ours | dict(inherited)
