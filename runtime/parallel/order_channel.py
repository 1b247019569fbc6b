"""The way of orders from rank 0 to all others: a broadcast for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

# int32 numbers of a broadcast, until a longer order comes.
FIRST_SIZE = 2048


class OrderChannel:
    """Every rank must know the size of a broadcast beforehand: that of the longest order so far.

    The rest of a longer one follows in a second broadcast, and from then on there is room for its like.
    collective: what a collective is called in.
    """

    def __init__(self, group: dist.ProcessGroup | None, collective: Callable[[], AbstractContextManager[None]]) -> None:
        self._group = group
        self._collective = collective
        self._size = FIRST_SIZE
        self._sending: list[dist.Work] = []

    def send(self, order: torch.Tensor) -> None:
        """Rank 0: give all others an order, int32 and not empty, without waiting until they have it."""
        head = torch.zeros(self._size, dtype=torch.int32)
        head[0] = length = len(order)
        fits = self._size - 1
        head[1 : 1 + length] = order[:fits]
        self._broadcast([head] if length <= fits else [head, order[fits:].contiguous()])
        self._fit(length)

    def end(self) -> None:
        """Rank 0: no order follows. All have heard of it when this returns."""
        self._broadcast([torch.zeros(self._size, dtype=torch.int32)])
        self._wait()

    def receive(self) -> torch.Tensor | None:
        """What rank 0 has sent; None for the end."""
        head = torch.empty(self._size, dtype=torch.int32)
        with self._collective():
            dist.broadcast(head, 0, group=self._group)
            length = int(head[0])
            rest = torch.empty(max(0, length - (self._size - 1)), dtype=torch.int32)
            if len(rest):
                dist.broadcast(rest, 0, group=self._group)
        self._fit(length)
        return torch.cat([head[1 : 1 + length], rest]) if length else None

    def _broadcast(self, parts: list[torch.Tensor]) -> None:
        self._wait()
        with self._collective():
            works = [dist.broadcast(part, 0, group=self._group, async_op=True) for part in parts]
        self._sending = [work for work in works if work is not None]

    def _wait(self) -> None:
        """Until the last order is on its way; raises what has happened to it."""
        with self._collective():
            for work in self._sending:
                work.wait()

    def _fit(self, length: int) -> None:
        while self._size <= length:
            self._size *= 2
