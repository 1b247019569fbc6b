"""How the links to rank 0 come about: it listens, and the group's store says where and with which password.

A store may outlive a group, as torchrun's does when it starts the ranks again: what it says may be of the group before.
Therefore a rank tries until it is welcomed, and the password, new for each group, is also the prefix of its other keys.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable

from torch.distributed import DistError, Store  # type: ignore[attr-defined]  # exported, but not declared so

from runtime.parallel.liveness import GroupFailed
from runtime.parallel.place import Place

MEETING_KEY = "specserve/meeting"
WELCOME = b"welcome\n"
LONGEST_LINE = 200
POLL_S = 0.2
GREETING_TIMEOUT_S = 5.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def accept_ranks(
    place: Place, store: Store, timeout_s: float, check: Callable[[], None]
) -> tuple[dict[int, socket.socket], str]:
    """Rank 0's end: a connection for each other rank, and the password.

    check: called while waiting; raises GroupFailed when a rank will not come.

    Raises:
        GroupFailed: not all have come within `timeout_s`; the message names those missing.
    """
    host = place.address if place.address in LOOPBACK else ""
    token = secrets.token_hex(16)
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout_s
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.settimeout(POLL_S)
        store.set(MEETING_KEY, json.dumps({"port": listener.getsockname()[1], "token": token}))
        while len(connections) < place.ranks - 1:
            check()
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, place.ranks)) - connections.keys())
                names = ", ".join(map(str, missing))
                raise GroupFailed(f"rank {names} of {place.ranks} did not come within {timeout_s:g} s")
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            rank = _greeted(connection, token)
            if rank is None or rank in connections or not 0 < rank < place.ranks:
                connection.close()
            else:
                connection.sendall(WELCOME)
                connections[rank] = connection
    return connections, token


def _greeted(connection: socket.socket, token: str) -> int | None:
    """The rank that greets with the token; None for a stranger."""
    connection.settimeout(GREETING_TIMEOUT_S)
    try:
        given, rank = _read_line(connection).decode().split()
        return int(rank) if secrets.compare_digest(given, token) else None
    except (OSError, ValueError):
        return None


def _read_line(connection: socket.socket) -> bytes:
    """Up to the end of a line or of the stream, byte by byte, so that nothing behind it is taken."""
    line = b""
    while not line.endswith(b"\n") and len(line) < LONGEST_LINE and (part := connection.recv(1)):
        line += part
    return line


def meet_rank_0(place: Place, store: Store, timeout_s: float) -> tuple[socket.socket, str]:
    """Another rank's end of the link, and the password.

    Raises:
        GroupFailed: rank 0 has welcomed nobody within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            meeting = json.loads(store.get(MEETING_KEY))
            connection = socket.create_connection((place.address, meeting["port"]), GREETING_TIMEOUT_S)
            connection.sendall(f"{meeting['token']} {place.rank}\n".encode())
            if _read_line(connection) == WELCOME:
                return connection, meeting["token"]
            connection.close()
            reason = "it refuses this rank"
        except (DistError, OSError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise GroupFailed(f"rank 0 cannot be reached at {place.address}: {reason}")
        time.sleep(POLL_S)
