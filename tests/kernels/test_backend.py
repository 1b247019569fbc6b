"""The choice of a backend, and that our packages are ours."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from kernels.backend import BackendUnavailable, choose_backend

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "package", ["kernels", "protos", "services", "speculation", "runtime", "training", "benchmarks"]
)
def test_packages_are_ours(package: str) -> None:
    module = import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / package
    assert not hasattr(module, "__version__")


def test_torch_can_be_asked_for() -> None:
    backend = choose_backend(torch.device("cpu"), "torch")
    assert (backend.name, backend.reason) == ("torch", "requested")


def test_the_cpu_gets_the_native_kernels_when_they_are_built() -> None:
    backend = choose_backend(torch.device("cpu"))
    assert backend.name == "native"
    assert backend.reason.startswith("loaded specserve-")


def test_without_a_library_torch_runs_and_says_why(tmp_path: Path) -> None:
    """In a fresh process, whose loader has not seen the real library."""
    program = f"""
import pathlib, torch, kernels.build
kernels.build.BUILD = pathlib.Path({str(tmp_path)!r})
from kernels.backend import BackendUnavailable, choose_backend
from kernels.native import native_available
assert not native_available()
backend = choose_backend(torch.device("cpu"))
print(backend.name, "|", backend.reason)
try:
    choose_backend(torch.device("cpu"), "native")
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    reason = "the native kernels are not built for this CPU; run python -m kernels.build"
    assert done.stdout.splitlines() == [f"torch | {reason}", reason]


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="triton does not run on the CPU"):
        choose_backend(torch.device("cpu"), "triton")
    with pytest.raises(BackendUnavailable, match="run on the CPU, not on cuda"):
        choose_backend(torch.device("cuda"), "native")
    with pytest.raises(ValueError, match="must be auto, native, triton or torch"):
        choose_backend(torch.device("cpu"), "cuda")  # type: ignore[arg-type]  # a name that the type excludes


def test_int8_weights_need_the_native_kernels() -> None:
    assert choose_backend(torch.device("cpu"), int8=True).int8
    for device, kernels in (("cpu", "torch"), ("cuda", "auto")):
        with pytest.raises(
            BackendUnavailable, match=f"int8 weights run with the native kernels.* not with {kernels} on {device}"
        ):
            choose_backend(torch.device(device), kernels, int8=True)  # type: ignore[arg-type]  # a loop widens the literals


def test_bfloat16_weights_compute_in_float32_on_the_cpu() -> None:
    assert choose_backend(torch.device("cpu"), "torch").activation_dtype(torch.bfloat16) is torch.float32
    assert choose_backend(torch.device("cuda"), "torch").activation_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_kv_cache_is_bfloat16_where_the_weights_are(stored: torch.dtype) -> None:
    expected = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    assert choose_backend(torch.device("cpu"), "native").kv_dtype(stored) is expected
    assert choose_backend(torch.device("cpu"), "torch").kv_dtype(stored) is torch.float32
