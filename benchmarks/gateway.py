"""What the gateway adds to each token, and how many streams it keeps open, measured without a model.

    python -m benchmarks.gateway --streams 1 --streams 500

One gateway process before a verifier of scripted tokens (benchmarks.scripted_verifier), with Redis, on one machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.client import CompletionClient, RequestFailed, Stream
from benchmarks.failures import STACK_FAILURES, exit_on
from benchmarks.stack import DRAIN_S, free_port, running_services
from services.common.model_files import resolve_model
from services.common.settings import to_flags
from services.gateway.tokenizer import GatewayTokenizer
from services.launcher.plan import LOOPBACK
from services.launcher.readiness import grpc_probe, http_probe, redis_probe
from services.launcher.redis_server import find_redis_server, redis_command, redis_url
from services.launcher.settings import EMBEDDED_LLM
from services.launcher.supervisor import Service

# One token, and text in any vocabulary of bytes.
WORD = "a"
# Pace of the answers: a fast model for one reader; many readers get about as many events a second in all.
ONE_STREAM_INTERVAL_MS, EVENTS_PER_S = 10.0, 500.0
# Time between two requests, so that opening the streams is not what is measured. All are open before the first ends.
OPENING_S = 0.01
TOKENS_OF_ONE, TOKENS_OF_MANY = 500, 20
RECORD_WAIT_S = 10.0


@dataclass(frozen=True)
class GatewayLoad:
    """streams: open at once. failed: those that broke or lacked tokens. added: from the verifier's hand-over of a token
    to gRPC to the client's having read its event."""

    streams: int
    failed: int
    events: int
    events_per_s: float
    added_ms_p50: float
    added_ms_p99: float


@dataclass
class SentTimes:
    """What the scripted verifier reported, by prompt."""

    by_prompt: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def line(self, text: str) -> None:
        """One line of a service: a record of the verifier's, or a log line, which is none of ours."""
        if text.startswith('{"prompt"'):
            record = json.loads(text)
            self.by_prompt[tuple(record["prompt"])] = record["sent"]


async def measure_gateway(model: str, streams: int, tokens: int, interval_ms: float) -> GatewayLoad:
    """Opens `streams` streams, OPENING_S after one another, each of `tokens` tokens.

    Raises:
        ServiceFailed, NoRedisServer, ModelFilesError: a part cannot start.
        RequestFailed: the verifier did not report what it sent.
    """
    sent, tokenizer = SentTimes(), GatewayTokenizer.from_folder(Path(resolve_model(model)))
    prompts = [tokenizer.encode(f"{WORD} {stream}") for stream in range(streams)]
    async with running_gateway(model, tokenizer.encode(WORD)[0], interval_ms, sent) as url:
        client = await asyncio.to_thread(CompletionClient.connect, url)
        await asyncio.to_thread(client.complete, WORD, 2)
        started = time.monotonic()
        results = await asyncio.to_thread(_open_all, client, prompts, tokens)
        total_s = time.monotonic() - started
        done = {tuple(prompts[i]): stream for i, stream in enumerate(results) if isinstance(stream, Stream)}
        await _wait_for_records(sent, list(done))
    added = [1000 * s for prompt, stream in done.items() for s in added_seconds(stream, sent.by_prompt[prompt])]
    complete = sum(stream.answer().text == WORD * tokens for stream in done.values())
    p50, p99 = np.percentile(added, [50, 99]) if added else (float("nan"), float("nan"))
    return GatewayLoad(streams, streams - complete, len(added), len(added) / total_s, float(p50), float(p99))


def added_seconds(stream: Stream, sent: Sequence[float]) -> Iterator[float]:
    """For each event: read by the client - sent by the verifier, of the last token that it brought."""
    tokens = 0
    for moment, event in zip(stream.times, stream.events, strict=True):
        text = "".join(choice["text"] for choice in event["choices"])
        if text:
            tokens += len(text) // len(WORD)
            yield stream.started + moment - sent[tokens - 1]


def _open_all(client: CompletionClient, prompts: Sequence[Sequence[int]], tokens: int) -> list[Stream | RequestFailed]:
    def open_one(index: int) -> Stream | RequestFailed:
        time.sleep(index * OPENING_S)
        try:
            return client.stream(prompts[index], tokens)
        except RequestFailed as failure:
            return failure

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(open_one, range(len(prompts))))


async def _wait_for_records(sent: SentTimes, prompts: Sequence[tuple[int, ...]]) -> None:
    """The verifier's lines come through a pipe, a moment after the streams have ended."""
    deadline = time.monotonic() + RECORD_WAIT_S
    while any(prompt not in sent.by_prompt for prompt in prompts):
        if time.monotonic() > deadline:
            raise RequestFailed("the scripted verifier did not report all of its answers")
        await asyncio.sleep(0.05)


@asynccontextmanager
async def running_gateway(model: str, token: int, interval_ms: float, sent: SentTimes) -> AsyncIterator[str]:
    """Redis, a scripted verifier and one gateway; gives the gateway's URL. sent: gets the verifier's records."""
    with tempfile.TemporaryDirectory(prefix="specserve-", ignore_cleanup_errors=True) as name:
        folder, ports = Path(name), (free_port(), free_port())
        services, url = _services(model, token, interval_ms, folder, ports)
        async with running_services(services, folder, sent.line):
            yield url


def _services(
    model: str, token: int, interval_ms: float, folder: Path, ports: tuple[int, int]
) -> tuple[list[Service], str]:
    verifier, redis, url = f"{LOOPBACK}:{ports[0]}", redis_url(folder), f"http://{LOOPBACK}:{ports[1]}"

    def command(module: str, settings: Mapping[str, object]) -> tuple[str, ...]:
        return (sys.executable, "-m", module, *to_flags(settings))

    scripted = {"model": model, "port": ports[0], "token": token, "interval_ms": interval_ms}
    gateway = {
        "host": LOOPBACK,
        "port": ports[1],
        "model": model,
        "verifier": (verifier,),
        "insecure": True,
        "redis_url": redis,
        "log_level": "warning",
        "drain_timeout_s": DRAIN_S,
    }
    services = [
        Service("redis", tuple(redis_command(find_redis_server(), folder)), redis_probe(redis), silent=True),
        Service("verifier", command("benchmarks.scripted_verifier", scripted), grpc_probe(verifier)),
        Service("gateway", command("services.gateway", gateway), http_probe(f"{url}/ready")),
    ]
    return services, url


async def measure_all(model: str, streams: Sequence[int]) -> list[GatewayLoad]:
    """One stream at a fast pace; more of them at EVENTS_PER_S in all."""
    return [
        await measure_gateway(model, 1, TOKENS_OF_ONE, ONE_STREAM_INTERVAL_MS)
        if count == 1
        else await measure_gateway(model, count, TOKENS_OF_MANY, 1000 * count / EVENTS_PER_S)
        for count in streams
    ]


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or hub id of the model whose tokenizer to use.")] = EMBEDDED_LLM,
    streams: Annotated[list[int] | None, typer.Option(min=1, help="Open at once; repeatable. [default: 1 500]")] = None,
) -> None:
    """Measures the gateway alone: what it adds to an event, and whether it keeps many streams open."""
    console, beside = Console(), Console(stderr=True)
    with exit_on(STACK_FAILURES, beside), beside.status("measuring"):
        loads = asyncio.run(measure_all(model, streams or [1, 500]))
    table = Table("open streams", "failed", "events", "events/s", "added ms p50", "p99")
    for load in loads:
        figures = (f"{load.events_per_s:.0f}", f"{load.added_ms_p50:.2f}", f"{load.added_ms_p99:.2f}")
        table.add_row(str(load.streams), str(load.failed), str(load.events), *figures)
    console.print(table)


if __name__ == "__main__":
    app()
