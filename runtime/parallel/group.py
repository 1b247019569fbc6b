"""A group of ranks that compute one model in lock-step.

Orders and agreements travel over Gloo, which waits without a device; tensors over NCCL on CUDA devices and Gloo on
CPUs. The process has one group, because torch.distributed has one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # exported, but not declared so

from runtime.parallel.collectives import gather_columns, ordered_sum
from runtime.parallel.liveness import Activity, GroupFailed, Link
from runtime.parallel.meeting import accept_ranks, meet_rank_0
from runtime.parallel.order_channel import OrderChannel
from runtime.parallel.place import Place
from runtime.parallel.sharding import Degrees

log = logging.getLogger(__name__)

# Loading a model takes different ranks a different time; what hangs is found by the links, never by a collective.
NEVER = timedelta(days=365)
JOIN_TIMEOUT_S = 300.0
# How long a collective that failed is held against this rank's own account of it: the links know who is at fault.
VERDICT_S = 5.0


class PeerLost(RuntimeError):
    """A collective failed: another rank is gone."""


class Group:
    """This rank's membership. Collectives are called by one thread, by all ranks in the same order.

    on_failure: called once, from any thread, with the GroupFailed that ends the group; it must end what waits for this
        rank, and may not count on the thread that steps.
    """

    def __init__(
        self, place: Place, degrees: Degrees, device: torch.device, on_failure: Callable[[GroupFailed], None]
    ) -> None:
        self.place = place
        self.degrees = degrees
        self.device = device
        self.activity = Activity()
        self.on_failure = on_failure
        self._failure: GroupFailed | None = None
        self._failed = threading.Event()
        self._failing = threading.Lock()
        self._links: dict[int, Link] = {}

    @classmethod
    def join(
        cls,
        place: Place,
        store: Store,
        degrees: Degrees,
        device: torch.device,
        timeout_s: float,
        on_failure: Callable[[GroupFailed], None],
        check: Callable[[], None] = lambda: None,
    ) -> Group:
        """Meet the other ranks.

        timeout_s: a rank that is silent, or computes without reaching a collective, for so long ends the group.
        check: see `accept_ranks`.

        Raises:
            GroupFailed: a rank did not come.
        """
        group = cls(place, degrees, device, on_failure)
        if place.rank == 0:
            connections, password = accept_ranks(place, store, JOIN_TIMEOUT_S, check)
        else:
            connection, password = meet_rank_0(place, store, JOIN_TIMEOUT_S)
            connections = {0: connection}
        group._links = {
            rank: Link(connection, rank, group.activity, timeout_s, group._fail)
            for rank, connection in connections.items()
        }
        group._connect(PrefixStore(password, store))
        log.info("group joined", extra={"rank": place.rank, "ranks": place.ranks, "tensors": group._backend})
        return group

    def _connect(self, store: Store) -> None:
        tensor, pipeline = self.degrees.tensor, self.degrees.pipeline
        self._backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.degrees.ranks, timeout=NEVER)
        self._control = dist.group.WORLD
        self.orders = OrderChannel(self._control, self._collective)
        # Every rank makes every group, as torch.distributed wants it.
        self._tensors = dist.new_group(backend=self._backend, timeout=NEVER)
        stages = [range(stage * tensor, (stage + 1) * tensor) for stage in range(pipeline)]
        groups = [dist.new_group(list(ranks), backend=self._backend, timeout=NEVER) for ranks in stages]
        self._stage_group = groups[self.rank // tensor]

    @property
    def rank(self) -> int:
        return self.place.rank

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave in order, rank 0 first, or tell the others what this rank ends with."""
        if self._failure is not None:
            return
        if error is not None:
            for link in self._links.values():
                link.tell_failure(self.rank, f"cannot go on: {str(error) or repr(error)}")
            return
        if self.rank == 0:
            with self.lockstep():
                self.orders.end()
        for link in self._links.values():
            link.close()
        dist.destroy_process_group()

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """What every rank does alike: an error in it ends the group.

        Raises:
            GroupFailed: instead of any other error, and at once when the group has failed already.
        """
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except Exception as error:
            if not (isinstance(error, PeerLost) and self._failed.wait(VERDICT_S)):
                self._fail(self.rank, f"failed: {error!r}")
            assert self._failure is not None
            raise self._failure from error

    def _fail(self, rank: int, reason: str) -> None:
        with self._failing:
            if self._failure is not None:
                return
            stage, tensor_rank = divmod(rank, self.degrees.tensor)
            self._failure = GroupFailed(
                f"rank {rank} of {self.degrees.ranks} (stage {stage}, tensor rank {tensor_rank}) {reason}"
            )
        self._failed.set()
        for link in self._links.values():
            link.tell_failure(rank, reason)
        self.on_failure(self._failure)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        with self.activity.waiting():
            try:
                yield
            except RuntimeError as error:
                raise PeerLost(str(error)) from error

    def minimum(self, number: int) -> int:
        """The smallest number of any rank."""
        value = torch.tensor([number], dtype=torch.int64)
        with self._collective():
            dist.all_reduce(value, dist.ReduceOp.MIN, group=self._control)
        return int(value)

    def check_same(self, facts: dict[str, str]) -> None:
        """Raise GroupFailed unless all ranks have the same facts; the message names a fact and a rank that differ."""
        others: list[dict[str, str]] = [{} for _ in range(self.degrees.ranks)]
        with self._collective():
            dist.all_gather_object(others, facts, group=self._control)
        for rank, other in enumerate(others):
            for name, value in others[0].items():
                if other[name] != value:
                    raise GroupFailed(f"rank {rank} has {name} {other[name]}, rank 0 has {value}; start them alike")

    def sum_in_stage(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the stage's parts, in the order of its ranks."""
        if self.degrees.tensor == 1:
            return part
        with self._collective():
            return ordered_sum(part, self.degrees.tensor, self._stage_group)

    def gather_vocabulary(self, logits: torch.Tensor, width: int) -> torch.Tensor | None:
        """See `gather_columns`; over the ranks of the stage."""
        if self.degrees.tensor == 1:
            return logits
        with self._collective():
            return gather_columns(logits, width, self.degrees.tensor, self._stage_group)

    def send(self, hidden: torch.Tensor, stage: int) -> None:
        """To the rank of the same place in another stage."""
        with self._collective():
            dist.send(hidden.contiguous(), self._counterpart(stage), group=self._tensors)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype, stage: int) -> torch.Tensor:
        hidden = torch.empty(shape, dtype=dtype, device=self.device)
        with self._collective():
            dist.recv(hidden, self._counterpart(stage), group=self._tensors)
        return hidden

    def _counterpart(self, stage: int) -> int:
        return stage * self.degrees.tensor + self.rank % self.degrees.tensor
