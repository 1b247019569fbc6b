"""Where a process stands in its group: the environment that torchrun gives to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class BadPlace(RuntimeError):
    """The environment says something that cannot be; the message is one line."""


@dataclass(frozen=True)
class Place:
    """One rank of `ranks`, and the local_rank-th of local_ranks on its machine.

    address, port: where the group meets, on rank 0's machine.
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    address: str
    port: int

    @classmethod
    def of_environment(cls, environ: Mapping[str, str]) -> Place | None:
        """None where the process was started as one by itself.

        Raises:
            BadPlace: a part is missing or is no number.
        """
        if "RANK" not in environ:
            return None
        if missing := [name for name in REQUIRED if name not in environ]:
            raise BadPlace(f"RANK is set, but {missing[0]} is not; start the ranks with torchrun or unset RANK")

        def number(name: str, default: str = "") -> int:
            text = environ.get(name, default)
            if not text.isdecimal():
                raise BadPlace(f"{name} is {text!r}; torchrun sets it to a number")
            return int(text)

        return cls(
            rank=number("RANK"),
            ranks=number("WORLD_SIZE"),
            local_rank=number("LOCAL_RANK", "0"),
            local_ranks=number("LOCAL_WORLD_SIZE", "1"),
            address=environ["MASTER_ADDR"],
            port=number("MASTER_PORT"),
        )

    @classmethod
    def first_of_local(cls, ranks: int, port: int) -> Place:
        """Rank 0 of a group on this machine that it starts itself."""
        return cls(0, ranks, 0, ranks, "127.0.0.1", port)

    def environment(self, rank: int) -> dict[str, str]:
        """What a rank on the same machine is told, from which it makes its own place."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }
