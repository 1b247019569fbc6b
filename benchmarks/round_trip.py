"""What the way to a speculator and back adds to a step.

    python -m benchmarks.round_trip --streams 1 --streams 8

The whole stack on one machine, every step drafting, twice in turns: with the speculator in a process of its own, and
inside of the verifier. What a step takes longer with two processes is what the way adds: the round trip itself
(serialisation, gRPC, the sockets, thread changes), less the part of it in which the verifier settles the step before,
and what caches forget meanwhile. The verifier's clock says how long its orders for drafts were out, the speculator's,
in each answer, how long it worked on it; the rest is the round trip.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import sys
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.client import CompletionClient, Prompt
from benchmarks.failures import STACK_FAILURES, exit_on
from benchmarks.load import stream_all
from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown_table, shown_command
from benchmarks.stack import free_port, running_stack
from services.common.model_files import resolve_model
from services.common.prompt_files import read_prompts
from services.gateway.tokenizer import GatewayTokenizer
from services.launcher.plan import LOOPBACK
from services.launcher.settings import EMBEDDED_LLM, UpSettings

RESULTS = Path(__file__).with_name("results")
PROMPTS = Path(__file__).with_name("prompts") / "mixed.jsonl"
STREAMS = (1, 8, 32)
ANSWER, ROUND_TRIP = "specserve_verifier_answer_seconds", "specserve_verifier_round_trip_seconds"
SETTLED = "specserve_verifier_settle_seconds"
DRAFTS, STEPS = "specserve_verifier_draft_seconds", "specserve_verifier_step_seconds"
# A single stream takes few steps for a request.
LEAST_REQUESTS = 24


Samples = dict[tuple[str, str], float]
"""By name and, of a histogram's bucket, its upper bound; summed over all other labels."""


@dataclass(frozen=True)
class RoundTrips:
    """Milliseconds: means of an order until its answer, of settling a step, and of a step with its drafts in two
    processes and in one; median and mean of the round trip.
    """

    streams: int
    orders: int
    answer_ms: float
    median_ms: float
    mean_ms: float
    settled_ms: float
    apart_ms: float
    inside_ms: float

    @property
    def worked_ms(self) -> float:
        return self.answer_ms - self.mean_ms

    @property
    def added_ms(self) -> float:
        return self.apart_ms - self.inside_ms


@dataclass
class _Asked:
    """A stack, and what its verifier has counted while it was asked."""

    client: CompletionClient
    metrics_port: int
    counted: Samples = field(default_factory=lambda: defaultdict(float))

    def ask(self, ids: Sequence[Prompt], new_tokens: int, streams: int) -> None:
        before = _samples(self.metrics_port)
        stream_all(self.client, ids, new_tokens, streams)
        for key, value in _samples(self.metrics_port).items():
            self.counted[key] += value - before[key]

    def mean_ms(self, name: str) -> float:
        return 1000 * self.counted[f"{name}_sum", ""] / self.counted[f"{name}_count", ""]


def _samples(port: int) -> Samples:
    samples: Samples = defaultdict(float)
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for each in family.samples:
                samples[each.name, each.labels.get("le", "")] += each.value
    return samples


async def measure_round_trips(
    up: UpSettings, prompts: Sequence[str], streams: Sequence[int], new_tokens: int, turns: int
) -> list[RoundTrips]:
    """Two running stacks, asked in turns with each number of streams at once.

    Raises:
        ServiceFailed, NoRedisServer, ModelFilesError: a part cannot start. RequestFailed: an answer failed.
    """
    tokenizer = GatewayTokenizer.from_folder(resolve_model(up.llm))
    ids: list[Prompt] = [tokenizer.encode(prompt) for prompt in prompts]
    async with AsyncExitStack() as running:
        apart, inside = [
            await running.enter_async_context(_stack(replace(up, speculator_process=process), ids, new_tokens))
            for process in (True, False)
        ]
        found = []
        for count in streams:
            wanted = list(itertools.islice(itertools.cycle(ids), max(LEAST_REQUESTS, 2 * count)))
            for stack in (apart, inside):
                stack.counted.clear()
            for turn in range(turns):
                for stack in (apart, inside) if turn % 2 == 0 else (inside, apart):
                    await asyncio.to_thread(stack.ask, wanted, new_tokens, count)
            found.append(_compare(count, apart, inside))
    return found


@asynccontextmanager
async def _stack(up: UpSettings, ids: Sequence[Prompt], new_tokens: int) -> AsyncIterator[_Asked]:
    """A stack that has answered each prompt once."""
    port = free_port()
    # No index of outputs: it would know each text from the turn before.
    options = {"verifier": {"draft_always": True, "metrics_port": port}, "speculator": {"suffix_index_tokens": 0}}
    async with running_stack(up, options, lambda _: None) as stack:
        client = await asyncio.to_thread(CompletionClient.connect, stack.url)
        await asyncio.to_thread(stream_all, client, ids, new_tokens, 1)
        yield _Asked(client, port)


def _compare(streams: int, apart: _Asked, inside: _Asked) -> RoundTrips:
    steps = [stack.mean_ms(DRAFTS) + stack.mean_ms(STEPS) for stack in (apart, inside)]
    buckets = sorted(
        (float(le), count) for (name, le), count in apart.counted.items() if name == f"{ROUND_TRIP}_bucket"
    )
    orders = int(apart.counted[f"{ANSWER}_count", ""])
    means = [apart.mean_ms(name) for name in (ROUND_TRIP, SETTLED)]
    return RoundTrips(streams, orders, apart.mean_ms(ANSWER), 1000 * _median(buckets), *means, *steps)


def _median(buckets: Sequence[tuple[float, float]]) -> float:
    """buckets: upper bounds and cumulative counts, both rising. Linear within a bucket."""
    half = buckets[-1][1] / 2
    lower, below = 0.0, 0.0
    for upper, count in buckets:
        if count >= half:
            return lower + (upper - lower) * (half - below) / (count - below)
        lower, below = upper, count
    raise ValueError("no counts")


def page(rows: Sequence[RoundTrips], command: str, machine: dict[str, str]) -> str:
    header = (
        "streams",
        "orders",
        "order to answer, ms",
        "the speculator works, ms",
        "round trip, median ms",
        "mean ms",
        "step before settled, ms",
        "a step, ms",
        "speculator inside, ms",
        "added, ms",
    )
    cells = [
        (
            str(row.streams),
            str(row.orders),
            *(
                f"{ms:.2f}"
                for ms in (
                    row.answer_ms,
                    row.worked_ms,
                    row.median_ms,
                    row.mean_ms,
                    row.settled_ms,
                    row.apart_ms,
                    row.inside_ms,
                    row.added_ms,
                )
            ),
        )
        for row in rows
    ]
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"""# Drafts: what the round trip adds

`{command}`, {date}. The embedded models, drafting in every step, asked through the gateway; means over all
orders where nothing else is said. The round trip is the time from an order to its answer less the speculator's work.
While it lasts, the verifier settles the step before (hands its tokens out, counts them, learns). A step is counted with
its drafts; that of a stack whose speculator drafts inside of the verifier, asked in turns with the other, has no round
trip: the difference is what the way to another process adds.

{markdown_table(header, cells, text_columns=0)}

{facts}
"""


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Large model: a folder or a hub id.")] = EMBEDDED_LLM,
    ssm: Annotated[
        list[str] | None, typer.Option(help="Small model that drafts; repeatable. [default: models/default-ssm-1]")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Streams at once; repeatable. [default: 1 8 32]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 96,
    turns: Annotated[int, typer.Option(min=1, help="How often each stack is asked for each number of streams.")] = 4,
    out: Annotated[Path, typer.Option(help="The page.")] = RESULTS / "round-trip-cpu.md",
) -> None:
    """Measures what the way to a speculator and back adds to a step."""
    console = Console(stderr=True)
    machine = describe_machine(0)
    with exit_on(STACK_FAILURES, console), console.status("asking the stacks"):
        up = UpSettings(llm=llm, ssm=tuple(ssm or ()))
        rows = asyncio.run(measure_round_trips(up, read_prompts(PROMPTS), streams or STREAMS, new_tokens, turns))
    out.write_text(page(rows, shown_command("benchmarks.round_trip", sys.argv[1:]), machine), encoding="utf-8")
    for row in rows:
        console.print(f"{row.streams} streams: round trip {row.median_ms:.2f} ms, added {row.added_ms:.2f}")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    app()
