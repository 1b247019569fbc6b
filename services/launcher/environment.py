"""The environment of the children: how long an idle thread spins."""

from __future__ import annotations

from collections.abc import Mapping

# Verifier and speculator take turns on the same cores. An OpenMP thread that spins between two operations of its own
# step wakes at once; one that still spins when the other service computes takes the core from it. The default of GNU
# OpenMP spins for milliseconds.
SPIN_COUNT = 20_000


def child_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited`, and a bounded OpenMP spin unless it gives one itself."""
    return {"GOMP_SPINCOUNT": str(SPIN_COUNT), "PYTHONUNBUFFERED": "1"} | dict(inherited)
