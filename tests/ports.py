"""Ports for servers that must be told theirs before they start."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below the range that outgoing connections take theirs from, and below the launcher's choices: nobody takes a port
# between the choice and the start of its server.
_CHOICES = range(10_000, 20_000)


def _own_choices() -> range:
    """Those of this process: no two workers of pytest-xdist share one."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return _CHOICES[worker % count :: count]


# In an order of its own, so that two runs beside each other hardly meet; no port comes again before all others did.
_order = itertools.cycle(random.sample(_own_choices(), len(_own_choices())))


def free_port() -> int:
    """A loopback port that nobody listens on, and that this process has not given out before."""
    for port in itertools.islice(_order, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"100 ports of {_CHOICES} are taken")
