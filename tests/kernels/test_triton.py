"""Runs the cases of the Triton kernels in processes of their own: in Triton's interpreter, through its compiler and,
where there is one, on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


# On a GPU each case compiles kernels of its own for a second or two.
TIMEOUT_S, GPU_TIMEOUT_S = 280, 1800
# Interpreter and compiler keep one core busy each; on a GPU so many processes find room.
MOST_WORKERS = 8


def run_cases(cases: str, at_least: int, interpret: bool = False, timeout_s: float = TIMEOUT_S) -> None:
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / cases), "-p", "no:cacheprovider", "-n", str(workers)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
    assert "skipped" not in done.stdout


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton has no wheel for this platform")


@needs_triton
@pytest.mark.parametrize(
    ("cases", "at_least"), [("triton_cases.py", 125), ("triton_linear_cases.py", 33), ("triton_growth_cases.py", 24)]
)
def test_in_the_interpreter(cases: str, at_least: int) -> None:
    run_cases(cases, at_least, interpret=True)


@needs_triton
def test_for_gpus_that_are_not_there() -> None:
    run_cases("triton_compilation.py", at_least=22)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("cases", "at_least"), [("triton_cases.py", 145), ("triton_linear_cases.py", 107), ("triton_growth_cases.py", 28)]
)
@pytest.mark.timeout(GPU_TIMEOUT_S + 60)
def test_on_the_gpu(cases: str, at_least: int) -> None:
    run_cases(cases, at_least, timeout_s=GPU_TIMEOUT_S)
