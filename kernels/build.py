"""Builds the native kernels: `python -m kernels.build` for this machine's own CPU; `python -m kernels.build portable`
for families of CPUs, for what is built here and runs elsewhere.

The library's name carries a hash of its source, the flags and, for this machine's own, the CPU, so that one from
another version or another machine is never loaded. Only this command needs a compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kernels.targets import NATIVE, cpu_identity, portable_targets

SOURCE = Path(__file__).parent / "native"
BUILD = Path(__file__).parent / "_build"
TIMEOUT_SECONDS = 600.0


class BuildError(RuntimeError):
    """The native kernels could not be built; the message says why and what to do."""


def compiler_flags(machine: str, target: str = NATIVE) -> list[str]:
    option = "-mcpu" if target == NATIVE and machine in ("aarch64", "arm64") else "-march"
    family, *extensions = target.split("+")
    # No contraction: whether a compiler fuses a product and a sum depends on the code around them, and a tree node must
    # round like a plain token. The source says where to fuse.
    rest = ["-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread"]
    return ["-std=c++17", "-O3", f"{option}={family}", *(f"-m{name}" for name in extensions), *rest]


def shared_library_path(target: str = NATIVE) -> Path:
    """Where the library of this source for that target is, or will be."""
    digest = hashlib.sha256()
    for source in sorted(SOURCE.glob("*.cpp")) + sorted(SOURCE.glob("*.h")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join(compiler_flags(platform.machine(), target)).encode())
    if target == NATIVE:
        digest.update(cpu_identity().encode())
    return BUILD / f"specserve-{target}-{digest.hexdigest()[:16]}.so"


def find_library() -> Path:
    """The library for this very CPU, else the most capable portable one that it can run.

    Raises:
        BuildError: there is none.
    """
    if (own := shared_library_path()).exists():
        return own
    missing: list[str] = []
    for target in portable_targets():
        if (path := shared_library_path(target.name)).exists():
            if not target.missing():
                return path
            missing.append(f"{target.name} (this CPU lacks {', '.join(target.missing())})")
    built = f"; there are libraries for {', '.join(missing)}" if missing else ""
    raise BuildError(f"the native kernels are not built for this CPU{built}; run python -m kernels.build")


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


def build(target: str = NATIVE) -> Path:
    """Compile unless the library is there already; libraries of other versions are removed.

    target: `native`, or one of portable_targets().

    Raises:
        BuildError: no compiler, or it failed or took longer than TIMEOUT_SECONDS.
    """
    library = shared_library_path(target)
    if library.exists():
        return library
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        unfinished = Path(scratch) / library.name
        sources = [str(source) for source in sorted(SOURCE.glob("*.cpp"))]
        command = [find_compiler(), *compiler_flags(platform.machine(), target), *sources, "-o", str(unfinished)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took longer than {TIMEOUT_SECONDS:.0f} s") from error
        if done.returncode:
            raise BuildError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr.strip()}")
        unfinished.replace(library)  # atomic: nobody loads half a library
    current = {shared_library_path(name) for name in (NATIVE, *(target.name for target in portable_targets()))}
    for stale in set(BUILD.glob("specserve-*.so")) - current:
        stale.unlink(missing_ok=True)
    return library


def main(targets: Sequence[str]) -> int:
    """Builds for each target, for this machine's own CPU when none is given; 1 when one could not be built.

    `portable` stands for all portable targets.
    """
    portable = [target.name for target in portable_targets()]
    allowed = (NATIVE, "portable", *portable)
    if unknown := sorted(set(targets) - set(allowed)):
        print(f"native kernels: no target {unknown[0]!r}; allowed: {', '.join(allowed)}", file=sys.stderr)
        return 2
    names = [name for target in targets or [NATIVE] for name in (portable if target == "portable" else [target])]
    for target in names:
        try:
            print(f"native kernels: {build(target)}")
        except BuildError as error:
            print(f"native kernels: not built, PyTorch's will run instead (slower). {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
