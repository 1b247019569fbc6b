"""What serves each configuration: our stack or a peer's server, started when its turn comes."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.configurations import Configuration, Precision
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.home import LLAMA_CPP, VLLM, Peers
from benchmarks.peers.server import (
    PeerServer,
    ServerTask,
    llama_command,
    running_server,
    vllm_command,
    vllm_environment,
)
from benchmarks.stack import ServiceOptions, running_stack
from services.common.model_files import resolve_model
from services.launcher.settings import UpSettings


@dataclass(frozen=True)
class Served:
    """Where to ask. url: of the OpenAI API. verifier: HOST:PORT, of our stack alone."""

    url: str
    verifier: str | None = None


@dataclass(frozen=True)
class Models:
    """What every configuration serves. device: "cpu", "cuda", ... threads: of the LLM, 0 for all cores."""

    llm: str
    ssms: tuple[str, ...]
    device: str
    threads: int

    @property
    def cores(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def context(self) -> int:
        """Longest sequence of the LLM, in tokens."""
        config = json.loads((resolve_model(self.llm) / "config.json").read_text(encoding="utf-8"))
        return int(config["max_position_embeddings"])


@dataclass
class Servers:
    """Starts servers for `models`; close with `async with`.

    work: a folder for converted models, and for what our verifiers keep over restarts.
    streams: the most sequences at once that will be asked for; a vLLM server, which takes a minute to start, is started
        once for all of them and sleeps in between.
    """

    models: Models
    peers: Peers
    work: Path
    streams: int
    on_line: Callable[[str], None]
    _kept: dict[str, PeerServer] = field(default_factory=dict)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def serving(self, configuration: Configuration, streams: int = 1) -> AsyncIterator[Served]:
        """The server of a configuration, for as many sequences at once.

        Raises:
            ServiceFailed: it did not become ready.
        """
        if configuration.engine == VLLM:
            if configuration.key not in self._kept:
                self._kept[configuration.key] = await self._stack.enter_async_context(self._vllm(configuration))
            with self._kept[configuration.key].awake() as url:
                yield Served(url)
        elif configuration.engine == LLAMA_CPP:
            async with self._llama(configuration, streams) as server:
                yield Served(server.url)
        else:
            async with self._ours(configuration) as served:
                yield served

    def gguf(self, model: str, precision: Precision) -> Path:
        """The model as a GGUF file, written when it is first asked for."""
        path = self.work / f"{Path(model).name}-{precision}.gguf"
        if not path.exists():
            write_gguf(resolve_model(model), path, precision)
        return path

    @asynccontextmanager
    async def _ours(self, configuration: Configuration) -> AsyncIterator[Served]:
        up = UpSettings(
            llm=self.models.llm,
            ssm=self.models.ssms[: configuration.ssms],
            speculator=configuration.drafts,
            speculator_per_ssm=configuration.apart,
            threads=self.models.threads,
        )
        device = {"device": self.models.device}
        kept = {"step_times": str(self.work / "kept" / configuration.key)}
        options: ServiceOptions = {
            "verifier": device | kept | configuration.verifier,
            "speculator": device | configuration.speculator,
        }
        async with running_stack(up, options, self.on_line) as stack:
            yield Served(stack.url, stack.verifier)

    @asynccontextmanager
    async def _llama(self, configuration: Configuration, streams: int) -> AsyncIterator[PeerServer]:
        folder, task = self.peers.folders[LLAMA_CPP], self._task(streams)
        llm = self.gguf(self.models.llm, configuration.dtype)
        draft = self.gguf(self.models.ssms[0], configuration.dtype) if configuration.drafts else None
        async with running_server(
            LLAMA_CPP, lambda port: llama_command(folder, configuration, llm, draft, task, port), {}, _ignore
        ) as server:
            yield server

    @asynccontextmanager
    async def _vllm(self, configuration: Configuration) -> AsyncIterator[PeerServer]:
        folder, task = self.peers.folders[VLLM], self._task(self.streams)
        llm = resolve_model(self.models.llm).resolve()
        draft = resolve_model(self.models.ssms[0]).resolve() if configuration.drafts else None
        environment = vllm_environment(folder, self.models.cores)
        async with running_server(
            VLLM, lambda port: vllm_command(folder, configuration, llm, draft, task, port), environment, _ignore
        ) as server:
            yield server

    def _task(self, streams: int) -> ServerTask:
        return ServerTask(self.models.context, streams, self.models.cores)


def _ignore(line: str) -> None:
    """Peers log every request; their last words stand in the error when they fail."""
