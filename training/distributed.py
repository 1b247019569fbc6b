"""Several processes that train one model together, as `torchrun` starts them; one process alone is a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process's place. rank: 0..size-1; rank 0 writes files and tells the user. device: its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers below `count` that are this process's work."""
        return range(self.rank, count, self.size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the group."""
        return DistributedDataParallel(module) if self.size > 1 else module

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.size > 1:
            distributed.barrier()

    def gather(self, own: T) -> list[T]:
        """Everybody's value, by rank."""
        if self.size == 1:
            return [own]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, own)
        return [value for value in values if value is not None]


@contextmanager
def joined_group() -> Iterator[Group]:
    """The group that torchrun's environment describes: NCCL between GPUs, Gloo between CPU processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if size == 1:
        yield Group(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Group(distributed.get_rank(), size, device)
    finally:
        distributed.destroy_process_group()
