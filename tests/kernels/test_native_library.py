"""The native library's threads: shared, safe to call from many threads and after a fork, and asleep when idle."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.native import get_num_threads, native_available, native_status, set_num_threads
from kernels.native.structures import pointer
from kernels.packed_linear.native import NativeLinear

ROOT = Path(__file__).parents[2]


def test_status_names_the_library() -> None:
    assert native_available()
    assert native_status().startswith("loaded specserve-")


def test_threads_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="0 threads; at least 1 is needed"):
        set_num_threads(0)


def test_callers_at_the_same_time_get_the_same_bits() -> None:
    torch.manual_seed(0)
    linear, x = NativeLinear(torch.randn(700, 300)), torch.randn(20, 300)
    expected = linear(x)
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: linear(x), range(200)))
    assert all(torch.equal(result, expected) for result in results)


def test_idle_workers_sleep() -> None:
    linear, x = NativeLinear(torch.randn(700, 300)), torch.randn(20, 300)
    assert get_num_threads() > 1
    for _ in range(20):
        linear(x)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_workers_leave_the_processor_to_others_between_steps() -> None:
    """Verifier and speculator take turns on one machine: what a pool burns after a step, the other's would need."""
    linear, x = NativeLinear(torch.randn(700, 300)), torch.randn(20, 300)
    pauses, burnt = 50, 0.0
    for _ in range(pauses):
        linear(x)
        before = time.process_time()
        time.sleep(0.004)
        burnt += time.process_time() - before
    # 50 microseconds of looking for more work by each worker, and waking up
    assert burnt / pauses < 0.0005


def test_a_forked_child_computes() -> None:
    program = """
import os, torch
from kernels.native import get_num_threads, set_num_threads
from kernels.packed_linear.native import NativeLinear
set_num_threads(2)
linear, x = NativeLinear(torch.randn(700, 300)), torch.randn(20, 300)
expected = linear(x)
child = os.fork()
if child == 0:
    os._exit(0 if get_num_threads() == 2 and torch.equal(linear(x), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(linear(x), expected)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)


def test_a_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="a tensor is on meta; the native kernels take tensors on the CPU"):
        pointer(torch.empty(1, device="meta"))
