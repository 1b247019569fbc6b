"""Notices that another rank has died or hangs, and says which.

Collectives wait for ever: a rank that waits for another is not at fault. Beside them every rank keeps a connection to
rank 0, on which both ends say each second, from threads of their own, for how long they have computed without reaching
a collective. The end of a connection, silence, and a computation without end are failures. Rank 0 tells the others of a
failure, and everyone acts on it by a callback, from one of these threads, because the main thread may never return.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

BEAT_S = 1.0


class GroupFailed(RuntimeError):
    """The group cannot go on; the message names the rank at fault."""


class Activity:
    """What the main thread is doing: computing, waiting for other ranks, or nothing that they wait for."""

    def __init__(self) -> None:
        self._computing_since: float | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A step: from here on the others wait for this rank."""
        self._computing_since = time.monotonic()
        try:
            yield
        finally:
            self._computing_since = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A collective, within a step or not."""
        was_computing = self._computing_since is not None
        self._computing_since = None
        try:
            yield
        finally:
            self._computing_since = time.monotonic() if was_computing else None

    def busy_s(self) -> float:
        """Seconds since the main thread last left a collective, while in a step."""
        since = self._computing_since
        return 0.0 if since is None else time.monotonic() - since


class Link:
    """A connection to one other rank.

    on_failure: called once, from a thread of the link, with the rank at fault and what it did.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: int,
        activity: Activity,
        timeout_s: float,
        on_failure: Callable[[int, str], None],
    ) -> None:
        self.peer = peer
        self._connection = connection
        self._activity = activity
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._closing = threading.Event()
        self._writing = threading.Lock()
        # A peer that reads nothing must not block the threads that tell it something.
        connection.settimeout(timeout_s)
        for target, name in ((self._read, "reader"), (self._beat, "beat")):
            threading.Thread(target=target, name=f"rank {peer} {name}", daemon=True).start()

    def tell_failure(self, rank: int, reason: str) -> None:
        """Tell the peer whose fault the end of the group is; nothing happens when it is gone."""
        self._write({"failed": rank, "reason": reason})

    def close(self) -> None:
        """An orderly end, which the peer does not take for a failure."""
        self._write({"end": True})
        self._closing.set()
        with suppress(OSError):  # the peer may have closed it already
            self._connection.shutdown(socket.SHUT_WR)

    def _beat(self) -> None:
        while not self._closing.wait(min(BEAT_S, self._timeout_s / 4)):
            self._write({"busy_s": self._activity.busy_s()})

    def _write(self, message: dict[str, object]) -> None:
        with self._writing, suppress(OSError):  # the reader notices
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        rank, reason = self._watch()
        if reason is not None and not self._closing.is_set():
            self._on_failure(rank, reason)

    def _watch(self) -> tuple[int, str | None]:
        """The rank at fault and what it did; None for an orderly end."""
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "end" in message:
                        return self.peer, None
                    if "failed" in message:
                        return message["failed"], message["reason"]
                    if message["busy_s"] > self._timeout_s:
                        return self.peer, f"has computed for {message['busy_s']:.0f} s without an end"
        except TimeoutError:
            return self.peer, f"has been silent for {self._timeout_s:g} s"
        except OSError as error:
            return self.peer, f"has lost its connection ({error.strerror or error})"
        return self.peer, "has ended"
