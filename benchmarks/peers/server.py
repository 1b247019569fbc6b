"""Runs the peers' own OpenAI servers. Knows their flags and environments, nothing of measuring."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.configurations import Configuration
from benchmarks.stack import free_port
from services.launcher.plan import LOOPBACK
from services.launcher.processes import Child, Watchdog
from services.launcher.readiness import http_probe
from services.launcher.supervisor import ServiceFailed

START_TIMEOUT_S = 400.0
POLL_S = 0.1
STOP_S = 10.0
# Of vLLM's key-value cache.
CACHE_GIB = 1


@dataclass(frozen=True)
class ServerTask:
    """What a server is for. context: tokens of one sequence. streams: sequences at once. threads: of the LLM."""

    context: int
    streams: int
    threads: int


def llama_command(
    folder: Path, configuration: Configuration, llm: Path, draft: Path | None, task: ServerTask, port: int
) -> list[str]:
    """llm, draft: GGUF files. Prompts are computed afresh each time, as in every other row."""
    return [
        str(folder / "bin" / "llama-server"),
        *("--host", LOOPBACK, "--port", str(port), "--model", str(llm), "--no-ui", "--no-cache-prompt"),
        *("--threads", str(task.threads), "--threads-batch", str(task.threads)),
        *("--parallel", str(task.streams), "--ctx-size", str(task.streams * task.context)),
        *(() if draft is None else ("--model-draft", str(draft))),
        *configuration.flags,
    ]


def vllm_command(
    folder: Path, configuration: Configuration, llm: Path, draft: Path | None, task: ServerTask, port: int
) -> list[str]:
    """llm, draft: Hugging Face folders."""
    flags = list(configuration.flags)
    if draft is not None:
        at = flags.index("--speculative-config") + 1
        flags[at] = json.dumps(json.loads(flags[at]) | {"model": str(draft)})
    return [
        *(str(folder / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", LOOPBACK, "--port", str(port), "--model", str(llm), "--dtype", configuration.dtype),
        *("--max-model-len", str(task.context), "--max-num-seqs", str(task.streams), "--no-enable-prefix-caching"),
        *flags,
    ]


def vllm_environment(folder: Path, threads: int) -> dict[str, str]:
    """What its documentation asks for on a CPU: bound threads, and its allocator and OpenMP preloaded if installed."""
    preload = [*folder.glob("allocator/**/libtcmalloc_minimal.so.4"), *folder.glob("lib/libiomp5.so")]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CACHE_ROOT": str(folder / "cache"),  # compiled once for each model
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # Its environment is its own: none of our packages, whatever folder the benchmark runs in.
        "PYTHONPATH": "",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": ":".join(map(str, preload)),
    }


@dataclass(frozen=True)
class PeerServer:
    """A running server, usable inside `awake`."""

    url: str
    child: Child

    @contextmanager
    def awake(self) -> Iterator[str]:
        """Lets the server run, and stops it in its tracks afterwards: an idle server must cost the others nothing."""
        os.killpg(self.child.pid, signal.SIGCONT)
        try:
            yield self.url
        finally:
            os.killpg(self.child.pid, signal.SIGSTOP)


@asynccontextmanager
async def running_server(
    name: str,
    command: Callable[[int], Sequence[str]],
    environment: Mapping[str, str],
    on_line: Callable[[str], None],
) -> AsyncIterator[PeerServer]:
    """The server, ready to be asked; stopped when the context ends. command: takes the port.

    Raises:
        ServiceFailed: it did not become ready.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="specserve-", ignore_cleanup_errors=True) as folder:
        async with Watchdog(Path(folder)) as keeper:
            child = await Child.start(name, command(port), os.environ | environment, keeper, on_line)
            try:
                await _wait_until_ready(name, child, f"http://{LOOPBACK}:{port}")
                yield PeerServer(f"http://{LOOPBACK}:{port}", child)
            finally:
                if child.running:
                    os.killpg(child.pid, signal.SIGCONT)
                await child.stop(STOP_S)


async def _wait_until_ready(name: str, child: Child, url: str) -> None:
    probe, deadline = http_probe(f"{url}/health"), time.monotonic() + START_TIMEOUT_S
    while (missing := await probe()) is not None:
        if not child.running:
            raise ServiceFailed(name, "ended at its start: " + " | ".join([*child.tail][-3:]), child.tail)
        if time.monotonic() > deadline:
            raise ServiceFailed(name, f"was not ready within {START_TIMEOUT_S:g} s ({missing})", child.tail)
        await asyncio.sleep(POLL_S)
