"""CPUs that the native kernels can be built for: this machine's own, or a family that many machines belong to."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

NATIVE = "native"
CPU_INFO = Path("/proc/cpuinfo")

# Features by their names in /proc/cpuinfo. The levels are those of the x86-64 psABI.
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Target:
    """A family of CPUs.

    name: the compiler's, and `+` and its name of each extension. features: what code for it needs.
    """

    name: str
    features: frozenset[str]

    def missing(self) -> list[str]:
        """Features that this CPU lacks."""
        return sorted(self.features - cpu_features())


_PORTABLE = {
    "x86_64": (
        Target("x86-64-v4+avx512bf16+amx-tile+amx-bf16", _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"}),
        Target("x86-64-v4+avx512bf16", _V4 | {"avx512_bf16"}),
        Target("x86-64-v4", _V4),
        Target("x86-64-v3", _V3),
    ),
    "aarch64": (Target("armv8-a", frozenset({"asimd"})),),
}


def portable_targets() -> tuple[Target, ...]:
    """The families that machines like this one may belong to, the most capable first."""
    return _PORTABLE.get(platform.machine(), ())


def cpu_features() -> frozenset[str]:
    """What the first CPU can do, as the kernel of the operating system reports it; empty where it reports nothing."""
    return frozenset(word for line in _first_cpu() if line.startswith(("flags", "Features")) for word in line.split())


def cpu_identity() -> str:
    """What distinguishes CPUs that need different code: the model and the features that the kernel reports."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    lines = [line for line in _first_cpu() if line.startswith(wanted)]
    return "\n".join(lines) or f"{platform.machine()} {platform.processor()}"


def _first_cpu() -> list[str]:
    return CPU_INFO.read_text().split("\n\n")[0].splitlines() if CPU_INFO.exists() else []
