"""The processes of a verifier on several devices: which of them this one is, starting the others, joining them.

Rank 0 is the verifier that others know; torchrun starts all ranks, or rank 0 starts the rest of its own on its machine.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta

import torch
from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]  # exported, but not declared so
from torch.distributed.rendezvous import rendezvous

from runtime.config import UnsupportedModel, read_config
from runtime.parallel.group import JOIN_TIMEOUT_S, Group
from runtime.parallel.liveness import GroupFailed
from runtime.parallel.place import Place
from runtime.parallel.sharding import Degrees
from runtime.transformer import LoadOptions
from services.common.lifecycle import StartupError
from services.common.model_files import resolve_model
from services.common.settings import to_flags
from services.verifier.settings import VerifierSettings

log = logging.getLogger(__name__)

EXIT_WAIT_S = 5.0


def degrees_of(settings: VerifierSettings) -> Degrees:
    return Degrees(settings.tensor_parallel, settings.pipeline_parallel)


def options_of(settings: VerifierSettings, place: Place | None) -> LoadOptions:
    """Each rank of a machine has a device of its own.

    Raises:
        StartupError: a machine has fewer CUDA devices than ranks, or one device is named for all of them.
    """
    options = LoadOptions(settings.device, settings.dtype, settings.kernels)
    device = options.resolve_device()
    if place is None or device.type != "cuda":
        return options
    if device.index is not None and place.local_ranks > 1:
        raise StartupError(f"device is {device} for {place.local_ranks} ranks; give cuda, and each takes its own")
    if place.local_ranks > (devices := torch.cuda.device_count()):
        raise StartupError(
            f"{place.local_ranks} ranks on a machine of {devices} CUDA devices; start at most one rank for each"
        )
    return replace(options, device=f"cuda:{place.local_rank if device.index is None else device.index}")


def check_place(settings: VerifierSettings, place: Place) -> None:
    """Raise StartupError unless the model divides and as many ranks were started as it is divided among."""
    try:
        degrees_of(settings).check(read_config(resolve_model(settings.llm)))
    except UnsupportedModel as error:
        raise StartupError(str(error)) from None
    if place.ranks != (wanted := degrees_of(settings).ranks):
        raise StartupError(
            f"{place.ranks} ranks were started; tensor_parallel {settings.tensor_parallel} times pipeline_parallel "
            f"{settings.pipeline_parallel} are {wanted}"
        )


class LocalRanks:
    """The other ranks of a group that rank 0 starts on its own machine."""

    def __init__(self, settings: VerifierSettings, place: Place) -> None:
        # They take no request and serve no metrics; a port of rank 0's would be taken.
        flags = to_flags(asdict(replace(settings, metrics_port=0)))
        self._processes = {
            rank: subprocess.Popen(
                (sys.executable, "-m", "services.verifier", *flags),
                env=dict(os.environ) | place.environment(rank),
                stdin=subprocess.DEVNULL,
            )
            for rank in range(1, place.ranks)
        }

    def check(self) -> None:
        """Raise GroupFailed when one has ended."""
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None:
                raise GroupFailed(f"rank {rank} ended at its start with {_described(code)}")

    def end(self) -> None:
        """Give them the time to end by themselves, then end them."""
        for rank, process in self._processes.items():
            try:
                process.wait(EXIT_WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning("rank did not end by itself and was killed", extra={"rank": rank})
                self.kill()

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()


def _described(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


@contextmanager
def joined(settings: VerifierSettings, place: Place | None) -> Iterator[Group | None]:
    """The group that this process is rank 0 of; None for a verifier of one process.

    Raises:
        StartupError: the ranks do not come together.
    """
    if place is not None:
        check_place(settings, place)
        store = environment_store()
        with join(settings, place, store, end_process) as group:
            yield group
    elif (ranks := degrees_of(settings).ranks) > 1:
        # The ranks are all on this machine; nothing need be reachable from others.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        place = Place.first_of_local(ranks, store.port)
        check_place(settings, place)
        others = LocalRanks(settings, place)
        try:
            with join(settings, place, store, end_process, others.check) as group:
                yield group
            others.end()
        finally:
            others.kill()
    else:
        yield None


def join(
    settings: VerifierSettings,
    place: Place,
    store: Store,
    on_failure: Callable[[GroupFailed], None],
    check: Callable[[], None] = lambda: None,
) -> Group:
    """Raises StartupError: the ranks do not come together, or have no devices."""
    device = options_of(settings, place).resolve_device()
    try:
        return Group.join(place, store, degrees_of(settings), device, settings.rank_timeout_s, on_failure, check)
    except GroupFailed as error:
        raise StartupError(str(error)) from None


def environment_store() -> Store:
    """The store that torchrun, or rank 0, tells of in the environment.

    Raises:
        StartupError: it is not there.
    """
    try:
        store: Store
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT_S)))
    except (DistError, RuntimeError) as error:
        raise StartupError(f"the ranks cannot meet: {str(error).splitlines()[0]}") from None
    return store


def end_process(failure: GroupFailed) -> None:
    """End this process, whose main thread may wait for a rank that is gone."""
    log.error("group failed", extra={"reason": str(failure)})
    os._exit(1)
