"""The machine and the versions that a table was made with. Tells no names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def describe_machine(threads: int) -> dict[str, str]:
    """Facts by name, in the order to print them. threads: as the services were told, 0 for all cores."""
    cpu = _cpu_fields()
    cores = len(os.sched_getaffinity(0))
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "CPU": f"{cpu.get('model name') or platform.machine()}, {cores} cores"
        f" ({', '.join(unit for unit in VECTOR_UNITS if unit in flags)})",
        **({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": _system(),
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
        "threads": f"{threads or cores} for the LLM and an SSM in its process, 1 for an SSM in one of its own",
        "load": f"{os.getloadavg()[0]:.1f} runnable processes in the minute before the start",
    }


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:  # not every system has the file
        return platform.system()
