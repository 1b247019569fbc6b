"""The native kernels built for lesser CPUs than this one: the same tests, in a process whose library is that build."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ("test_packed_linear.py", "test_tree_attention.py", "test_decoder_blocks.py")
PROGRAM = """
import pathlib, sys
import pytest
from kernels import build

tests = sys.argv[3:]
flags = build.compiler_flags
build.BUILD = pathlib.Path(sys.argv[1])
build.compiler_flags = lambda machine, target=None: flags(machine, sys.argv[2])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for lesser x86-64 CPUs")
@pytest.mark.parametrize("target", ["x86-64-v3", pytest.param("x86-64", marks=pytest.mark.slow)])
def test_lesser_targets(target: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), target, *TESTS],
        cwd=ROOT / "tests" / "kernels",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert len(list(tmp_path.glob("specserve-*.so"))) == 1
