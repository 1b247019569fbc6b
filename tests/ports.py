"""Ports for servers that must be told theirs before they start."""

from __future__ import annotations

import random
import socket

# Below the range that outgoing connections take theirs from, so that none of them takes a port between the choice and
# the start of its server.
_CHOICES = range(20_000, 30_000)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    for port in random.sample(_CHOICES, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"100 ports of {_CHOICES} are taken")
