"""Ends the services when the launcher dies without doing so itself, by SIGKILL for example.

A program of its own that uses the standard library alone, started as `python -I -S watchdog.py FOLDER`. It reads lines
from the launcher: "+PGID" and "-PGID" for each process group that starts and ends, "done" before an orderly exit. The
end of the input without "done" means that the launcher is gone: every group gets SIGTERM, after GRACE_S SIGKILL, and
the launcher's folder is removed.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

GRACE_S = 5.0
POLL_S = 0.05


def watch(folder: str) -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        command = line.strip()
        if command == "done":
            return
        if command.startswith("+"):
            groups.add(int(command[1:]))
        elif command.startswith("-"):
            groups.discard(int(command[1:]))
    end(groups)
    shutil.rmtree(folder, ignore_errors=True)  # it may be half written; nobody is left to tell


def end(groups: set[int]) -> None:
    """SIGTERM to every group, SIGKILL after GRACE_S to those that are left."""
    send(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(alive(group) for group in groups) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    send(groups, signal.SIGKILL)


def send(groups: set[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the launcher, whose end it waits for
    watch(sys.argv[1])
