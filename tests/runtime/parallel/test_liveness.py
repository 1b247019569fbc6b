"""A link names the rank that ended, is silent or computes for ever, and nobody who waits or leaves in order."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from runtime.parallel.liveness import Activity, Link

TIMEOUT_S = 1.0
PATIENCE_S = 20


@dataclass
class End:
    """One end of a link, which calls its peer by `peer`."""

    peer: int
    connection: socket.socket
    activity: Activity = field(default_factory=Activity)
    failures: queue.SimpleQueue[tuple[int, str]] = field(default_factory=queue.SimpleQueue)

    def start(self) -> Link:
        return Link(
            self.connection, self.peer, self.activity, TIMEOUT_S, lambda rank, reason: self.failures.put((rank, reason))
        )


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    """Rank 0's end and that of rank 1."""
    first, second = socket.socketpair()
    with first, second:
        yield End(1, first), End(0, second)


def test_ranks_that_wait_or_do_nothing_are_no_failure(ends: tuple[End, End]) -> None:
    lead, other = ends
    links = [end.start() for end in ends]
    with lead.activity.computing(), lead.activity.waiting():
        time.sleep(3 * TIMEOUT_S)
    for link in links:
        link.close()
    time.sleep(TIMEOUT_S)
    assert lead.failures.empty()
    assert other.failures.empty()


def test_an_end_without_a_word(ends: tuple[End, End]) -> None:
    lead, other = ends
    lead.start()
    other.connection.close()
    rank, reason = lead.failures.get(timeout=PATIENCE_S)
    assert rank == 1
    assert "ended" in reason or "lost its connection" in reason


def test_silence(ends: tuple[End, End]) -> None:
    lead, _ = ends
    lead.start()
    assert lead.failures.get(timeout=PATIENCE_S) == (1, f"has been silent for {TIMEOUT_S:g} s")


def test_a_computation_without_end(ends: tuple[End, End]) -> None:
    lead, other = ends
    links = [end.start() for end in ends]
    with other.activity.computing():
        rank, reason = lead.failures.get(timeout=PATIENCE_S)
    assert rank == 1
    assert "has computed for" in reason
    assert other.failures.empty(), "rank 0 is well"
    for link in links:
        link.close()


def test_the_others_are_told_whose_fault_it_is(ends: tuple[End, End]) -> None:
    lead, other = ends
    link = lead.start()
    other.start()
    link.tell_failure(3, "has ended")
    assert other.failures.get(timeout=PATIENCE_S) == (3, "has ended")
