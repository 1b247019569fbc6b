"""The launcher's process handling with real processes: start, death, restart, drain, and its own violent end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.services.launcher.conftest import Launch, alive, wait_until
from tests.services.launcher.example_up import CHILDREN


def test_all_start_and_ctrl_c_drains_the_last_first(launch: Launch) -> None:
    run = launch(front=["--drain-s", "0.3"])
    run.wait_ready()
    assert sorted(run.events("started")) == sorted(CHILDREN)
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 0
    assert run.events("stopped") == list(reversed(CHILDREN))
    assert not any(alive(pid) for pid in run.all_pids())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the policy")
def test_one_that_yields_takes_no_core_from_a_running_thread(launch: Launch) -> None:
    run = launch()
    run.wait_ready()
    policies = {name: os.sched_getscheduler(run.pids(name)[0]) for name in CHILDREN}
    assert policies == dict.fromkeys(CHILDREN, os.SCHED_OTHER) | {"front": os.SCHED_BATCH}


def test_a_child_that_fails_at_its_start_stops_all_with_its_last_words(launch: Launch) -> None:
    run = launch(model=["--fail"])
    code, err = run.end()
    assert code == 1
    assert "model | first line" in err
    assert "model | the model is missing" in err, "though it ends without a newline"
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


def test_a_child_that_dies_before_its_own_children_is_restarted_at_once(launch: Launch) -> None:
    run = launch(model=["--grandchild"])
    run.wait_ready()
    os.kill(run.pids("model")[0], signal.SIGKILL)
    run.wait_started("model", 2)
    assert not alive(run.pids("model", "grandchild")[0]), "what it left behind ends with it"


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
