"""Launchers with example children, and what happened to these."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMEOUT_S = 15.0


@dataclass
class Run:
    """One launcher and the journal of its children."""

    process: subprocess.Popen[str]
    folder: Path
    journal: Path

    def events(self, event: str) -> list[str]:
        """Names of the children that the event happened to, in order."""
        return [line.split()[0] for line in self._lines() if line.split()[1] == event]

    def pids(self, name: str, event: str = "started") -> list[int]:
        return [int(line.split()[2]) for line in self._lines() if line.split()[:2] == [name, event]]

    def all_pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self._lines()]

    def _lines(self) -> list[str]:
        return self.journal.read_text().splitlines()

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "all are ready\n":
                return
        raise AssertionError("the launcher ended before it was ready")

    def wait_started(self, name: str, times: int) -> None:
        wait_until(lambda: len(self.pids(name)) == times)

    def wait_gone(self) -> None:
        wait_until(lambda: not any(alive(pid) for pid in self.all_pids()))

    def end(self) -> tuple[int, str]:
        """The exit code and what the launcher told."""
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, err


Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    runs: list[Run] = []

    def start(limits: dict[str, float] | None = None, **flags: list[str]) -> Run:
        folder, journal = tmp_path / "run", tmp_path / "journal"
        folder.mkdir()
        journal.touch()
        arguments = [str(folder), str(journal), json.dumps({"backoff_s": 0.1, **(limits or {})}), json.dumps(flags)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.launcher.example_up", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        runs.append(Run(process, folder, journal))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate(timeout=TIMEOUT_S)
        run.wait_gone()


def alive(pid: int) -> bool:
    """False also for a zombie: what is dead but not yet reaped by its new parent is no orphan at work."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
