"""A service that runs but does not answer is named, killed and restarted; a slow one is not. Real processes."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.services.launcher.conftest import Launch, Run, alive, wait_until

ATTEMPTS = 3
TIMEOUT_S = 0.5
IMPATIENT = {"alive_pause_s": 0.05, "alive_timeout_s": TIMEOUT_S, "alive_attempts": ATTEMPTS}
# From a question to the kill, and how much later that may be on a busy machine.
SILENCE_S = ATTEMPTS * TIMEOUT_S
LATE_S = 10.0


def wait_asked(run: Run, name: str, times: int) -> None:
    wait_until(lambda: len(run.pids(name, "is-alive")) >= times)


@pytest.mark.parametrize("name", ["model", "drafter"])
def test_one_that_hangs_is_named_killed_and_restarted_alone(name: str, launch: Launch) -> None:
    run = launch(IMPATIENT, **{name: ["--grandchild"]})
    run.wait_ready()
    (hung,) = run.pids(name)
    (grandchild,) = run.pids(name, "grandchild")
    wait_asked(run, name, 1)
    os.kill(hung, signal.SIGSTOP)
    stopped = time.monotonic()
    run.wait_started(name, 2)
    assert SILENCE_S - TIMEOUT_S < time.monotonic() - stopped < SILENCE_S + LATE_S
    assert not alive(hung)
    assert not alive(grandchild), "its whole group is killed"
    asked = len(run.pids(name, "is-alive"))
    wait_asked(run, name, asked + 2)  # the new one answers, and is watched like the old one
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 0
    (seconds,) = re.findall(rf"{name} runs but did not answer for ([\d.]+) s; it is killed", err)
    assert SILENCE_S - 0.1 <= float(seconds) < SILENCE_S + LATE_S
    assert f"{name} ended with signal 9; it is restarted" in err
    assert err.count(f"{name} is ready after") == 2
    assert {len(run.pids(other)) for other in {"store", "drafter", "model", "front"} - {name}} == {1}


def test_a_slow_one_is_left_alone(launch: Launch) -> None:
    """Most answers are late, some too late; as many in a row as end a service never are."""
    slow = ["--slow-s", "0.3", "0.3", "0.7", "0.0"]
    run = launch(IMPATIENT, model=slow)
    run.wait_ready()
    wait_asked(run, "model", 16)
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 0
    assert len(run.pids("model")) == 1
    assert "did not answer" not in err


def test_one_that_closed_its_port_is_as_silent_as_one_that_hangs(launch: Launch) -> None:
    """A connection that is refused at once does not make the silence shorter."""
    run = launch(IMPATIENT, model=["--deaf-after", "2"])
    run.wait_ready()
    run.wait_started("model", 2)
    run.process.send_signal(signal.SIGTERM)
    _, err = run.end()
    seconds = re.findall(r"model runs but did not answer for ([\d.]+) s", err)
    assert float(seconds[0]) >= SILENCE_S - 0.1


def test_one_that_stops_is_not_asked(launch: Launch) -> None:
    run = launch(IMPATIENT, front=["--drain-s", "1.0"])
    run.wait_ready()
    wait_asked(run, "model", 2)
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: run.events("asked") == ["front"])
    before = len(run.events("is-alive"))
    code, err = run.end()
    assert code == 0
    assert len(run.events("is-alive")) - before <= 4, "at most those under way"
    assert "did not answer" not in err


def test_a_launcher_that_was_stopped_itself_kills_nothing(launch: Launch) -> None:
    run = launch(IMPATIENT)
    run.wait_ready()
    wait_asked(run, "front", 1)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(2 * SILENCE_S)
    run.process.send_signal(signal.SIGCONT)
    asked = len(run.events("is-alive"))
    wait_until(lambda: len(run.events("is-alive")) >= asked + 8)
    assert [len(run.pids(name)) for name in ("store", "drafter", "model", "front")] == [1, 1, 1, 1]
