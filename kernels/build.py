"""Builds the native kernels for this machine's own CPU: `python -m kernels.build`.

The library's name carries a hash of its source, the flags and the CPU, so that one from another version or another
machine is never loaded. Only this command needs a compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "native"
BUILD = Path(__file__).parent / "_build"
TIMEOUT_SECONDS = 600.0


class BuildError(RuntimeError):
    """The native kernels could not be built; the message says why and what to do."""


def compiler_flags(machine: str) -> list[str]:
    native = "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"
    # No contraction: whether a compiler fuses a product and a sum depends on the code around them, and a tree node must
    # round like a plain token. The source says where to fuse.
    return ["-std=c++17", "-O3", native, "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread"]


def cpu_identity() -> str:
    """What distinguishes CPUs that need different code: the model and the features that the kernel reports."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    first_cpu = info.read_text().split("\n\n")[0].splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in first_cpu if line.startswith(wanted))


def library_path() -> Path:
    """Where the library of this source for this machine is, or will be."""
    digest = hashlib.sha256()
    for source in sorted(SOURCE.glob("*.cpp")) + sorted(SOURCE.glob("*.h")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join(compiler_flags(platform.machine())).encode())
    digest.update(cpu_identity().encode())
    return BUILD / f"specserve-{digest.hexdigest()[:16]}.so"


def find_compiler() -> str:
    """$CXX, else c++, g++ or clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: looked for {', '.join(wanted)}; install g++ or clang++, or set CXX to one")


def build() -> Path:
    """Compile unless the library is there already; libraries of other versions are removed.

    Raises:
        BuildError: no compiler, or it failed or took longer than TIMEOUT_SECONDS.
    """
    target = library_path()
    if target.exists():
        return target
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        unfinished = Path(scratch) / target.name
        sources = [str(source) for source in sorted(SOURCE.glob("*.cpp"))]
        command = [find_compiler(), *compiler_flags(platform.machine()), *sources, "-o", str(unfinished)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took longer than {TIMEOUT_SECONDS:.0f} s") from error
        if done.returncode:
            raise BuildError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr.strip()}")
        unfinished.replace(target)  # atomic: nobody loads half a library
    for stale in BUILD.glob("specserve-*.so"):
        if stale != target:
            stale.unlink(missing_ok=True)
    return target


def main() -> int:
    try:
        print(f"native kernels: {build()}")
    except BuildError as error:
        print(f"native kernels: not built, PyTorch's will run instead (slower). {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
