"""Where the verifiers are: addresses as given, and what their names resolve to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """One verifier: an IP address and a port. name: the host that was given, which its certificate must carry."""

    ip: str
    port: int
    name: str

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def split(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; ValueError when it is not that."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host, int(port)


async def resolve(texts: Iterable[str]) -> frozenset[Address]:
    """All addresses behind each HOST:PORT; OSError when a name cannot be resolved.

    A host with addresses of both families is counted by its IPv4 ones alone: the others lead to the same servers.
    """
    found: set[Address] = set()
    for text in texts:
        host, port = split(text)
        if _is_ip(host):
            found.add(Address(host, port, host))
            continue
        entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        families = {family for family, *_ in entries}
        wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        found |= {Address(str(entry[0]), port, host) for family, _, _, _, entry in entries if family == wanted}
    return frozenset(found)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
