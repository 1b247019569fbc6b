"""Verifiers of several ranks as an operator starts them, and their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from tests.ports import free_port
from tests.services.harness import Verifier

START_TIMEOUT_S = 120
GRACE_S = 10
MARK = "RANKS_OF_TEST"  # an environment variable by which the processes of a verifier are found
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-backend=c10d", "--nnodes=1")


class RankedVerifier(Verifier):
    """A verifier, the process that was started for it, and its log so far."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        super().__init__(f"127.0.0.1:{port}", CollectorRegistry())
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def pids(self) -> dict[int, int]:
        """The processes that are ranks, by rank; what torchrun itself is has none and is left out."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            environ = _environment(folder)
            if environ.get(MARK) == self.address and "RANK" in environ:
                found[int(environ["RANK"])] = int(folder.name)
        return found

    def signal(self, rank: int, number: int) -> None:
        pids = self.pids()
        assert rank in pids, f"rank {rank} does not run\n{self.log}"
        os.kill(pids[rank], number)

    def ready(self) -> bool:
        with suppress(grpc.RpcError):
            return bool(self.info().model)
        return False

    def wait_ready(self) -> None:
        wait_until(lambda: self.ready() or self.process.poll() is not None, START_TIMEOUT_S)
        assert self.process.poll() is None, self.log


@contextmanager
def ranked_verifier(
    llm: Path, folder: Path, *flags: str, torchrun: tuple[str, ...] = (), wait: bool = True
) -> Iterator[RankedVerifier]:
    """Start one with `flags`, by torchrun with arguments of its own where given; nothing of it is left at the end."""
    port = free_port()
    program = ("-m", "services.verifier") if not torchrun else (*TORCHRUN, *torchrun, "-m", "services.verifier")
    settings = (
        f"--llm={llm}",
        f"--port={port}",
        "--insecure",
        "--kv-memory=0.01",
        "--threads=1",
        "--draft-always",
    )
    log = folder / "verifier.log"
    environ = os.environ | {MARK: f"127.0.0.1:{port}"}
    with open(log, "wb") as out:
        process = subprocess.Popen((sys.executable, *program, *settings, *flags), stdout=out, stderr=out, env=environ)
    verifier = RankedVerifier(port, process, log)
    try:
        if wait:
            verifier.wait_ready()
        yield verifier
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        process.kill()
        process.wait()
        for pid in verifier.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _environment(process: Path) -> dict[str, str]:
    with suppress(OSError):  # it has ended, or is not ours
        pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
