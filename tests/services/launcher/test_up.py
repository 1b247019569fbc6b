"""The launcher's process handling with real processes: start, death, restart, drain, and its own violent end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.launcher.example_up import CHILDREN

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


def test_all_start_and_ctrl_c_drains_the_last_first(launch: Launch) -> None:
    run = launch(front=["--drain-s", "0.3"])
    run.wait_ready()
    assert sorted(run.events("started")) == sorted(CHILDREN)
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 0
    assert run.events("stopped") == list(reversed(CHILDREN))
    assert not any(alive(pid) for pid in run.all_pids())


def test_a_child_that_fails_at_its_start_stops_all_with_its_last_words(launch: Launch) -> None:
    run = launch(model=["--fail"])
    code, err = run.end()
    assert code == 1
    assert "model | first line" in err
    assert "error: model ended at its start with exit code 3: the model is missing\n" in err
    assert not any(alive(pid) for pid in run.all_pids())


def test_a_child_that_is_never_ready_is_named_with_what_is_missing(launch: Launch) -> None:
    run = launch({"start_timeout_s": 1.0}, drafter=["--never-ready"])
    code, err = run.end()
    assert code == 1
    assert "error: drafter was not ready within 1 s" in err
    assert "503" in err
    assert not any(alive(pid) for pid in run.all_pids())


def test_ctrl_c_during_the_start_stops_what_has_started(launch: Launch) -> None:
    run = launch(model=["--never-ready"])
    wait_until(lambda: len(run.events("started")) == len(CHILDREN))
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 0
    assert not any(alive(pid) for pid in run.all_pids())


def test_a_child_that_dies_is_restarted_alone(launch: Launch) -> None:
    run = launch()
    run.wait_ready()
    for name in ("drafter", "model"):
        (first,) = run.pids(name)
        os.kill(first, signal.SIGKILL)
        run.wait_started(name, 2)
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 0
    assert "drafter ended with signal 9; it is restarted" in err
    assert len(run.pids("front")) == len(run.pids("store")) == 1
    assert not any(alive(pid) for pid in run.all_pids())


def test_a_child_that_dies_too_often_stops_everything(launch: Launch) -> None:
    run = launch({"restarts": 1})
    run.wait_ready()
    for deaths in (1, 2):
        run.wait_started("model", deaths)
        os.kill(run.pids("model")[-1], signal.SIGKILL)
    code, err = run.end()
    assert code == 1
    assert "error: model died 2 times within 120 s, last with signal 9" in err
    assert not any(alive(pid) for pid in run.all_pids())


def test_an_expendable_child_may_die_for_ever(launch: Launch) -> None:
    run = launch({"restarts": 0, "backoff_s": 0.01})
    run.wait_ready()
    for deaths in (1, 2, 3):
        run.wait_started("drafter", deaths)
        os.kill(run.pids("drafter")[-1], signal.SIGKILL)
    run.wait_started("drafter", 4)
    assert run.process.poll() is None


def test_a_child_that_ignores_the_signal_is_killed_with_its_own_children(launch: Launch) -> None:
    run = launch({"stop_timeout_s": 0.3}, front=["--stubborn", "--grandchild"])
    run.wait_ready()
    run.process.send_signal(signal.SIGINT)
    code, err = run.end()
    assert code == 0
    assert "front did not stop in time and was killed" in err
    assert len(run.pids("front", "grandchild")) == 1
    run.wait_gone()


def test_a_second_ctrl_c_ends_everything_at_once(launch: Launch) -> None:
    run = launch({"stop_timeout_s": 60}, front=["--stubborn"])
    run.wait_ready()
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: run.events("asked") == ["front"])
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 1
    assert not any(alive(pid) for pid in run.all_pids())


def test_a_launcher_that_is_killed_leaves_nothing_behind(launch: Launch) -> None:
    run = launch(front=["--grandchild"])
    run.wait_ready()
    assert all(alive(pid) for pid in run.all_pids())
    run.process.kill()
    run.wait_gone()
    wait_until(lambda: not run.folder.exists())


def test_a_launcher_killed_during_the_start_leaves_nothing_behind(launch: Launch) -> None:
    run = launch(model=["--never-ready"])
    wait_until(lambda: len(run.events("started")) == len(CHILDREN))
    run.process.kill()
    run.wait_gone()


def test_a_watchdog_that_is_killed_is_replaced(launch: Launch) -> None:
    def watchdogs() -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(run.process.pid), "-f", "watchdog.py"], capture_output=True)
        return [int(pid) for pid in found.stdout.split()]

    run = launch()
    run.wait_ready()
    (first,) = watchdogs()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(watchdogs()) == 1 and watchdogs() != [first])
    run.process.kill()
    run.wait_gone()
