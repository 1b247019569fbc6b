"""What the way to a speculator and back adds to a step.

    python -m benchmarks.round_trip --streams 1 --streams 8

The whole stack as processes on one machine, every step drafting. The verifier's clock says how long its orders for
drafts were out, the speculator's, in each answer, how long it worked on it; the rest is the round trip: serialisation,
gRPC, the sockets, thread changes. Meanwhile the verifier settles the step before (hands its tokens out, counts,
learns), which it has to do anyway: what is left of the round trip is added to the step.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
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
# A single stream takes few steps for a request.
LEAST_REQUESTS = 24


Samples = dict[tuple[str, str], float]
"""By name and, of a histogram's bucket, its upper bound."""


@dataclass(frozen=True)
class RoundTrips:
    """Milliseconds: means of an order until its answer and of settling a step, median and mean of the round trip."""

    streams: int
    orders: int
    answer_ms: float
    median_ms: float
    mean_ms: float
    settled_ms: float

    @property
    def worked_ms(self) -> float:
        return self.answer_ms - self.mean_ms

    @property
    def added_ms(self) -> float:
        return self.median_ms - self.settled_ms


def _samples(port: int) -> Samples:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(each.name, each.labels.get("le", "")): each.value for family in families for each in family.samples}


async def measure_round_trips(
    up: UpSettings, prompts: Sequence[str], streams: Sequence[int], new_tokens: int
) -> list[RoundTrips]:
    """One running stack, asked with each number of streams at once.

    Raises:
        ServiceFailed, NoRedisServer, ModelFilesError: a part cannot start. RequestFailed: an answer failed.
    """
    tokenizer = GatewayTokenizer.from_folder(resolve_model(up.llm))
    ids: list[Prompt] = [tokenizer.encode(prompt) for prompt in prompts]
    port = free_port()
    options = {"verifier": {"draft_always": True, "metrics_port": port}}
    async with running_stack(up, options, lambda _: None) as stack:
        client = await asyncio.to_thread(CompletionClient.connect, stack.url)
        await asyncio.to_thread(stream_all, client, ids, new_tokens, 1)
        found = []
        for count in streams:
            wanted = list(itertools.islice(itertools.cycle(ids), max(LEAST_REQUESTS, 2 * count)))
            before = _samples(port)
            await asyncio.to_thread(stream_all, client, wanted, new_tokens, count)
            found.append(_between(count, before, _samples(port)))
    return found


def _between(streams: int, before: Samples, after: Samples) -> RoundTrips:
    came = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def mean_ms(name: str) -> float:
        return 1000 * came[f"{name}_sum", ""] / came[f"{name}_count", ""]

    buckets = sorted((float(le), count) for (name, le), count in came.items() if name == f"{ROUND_TRIP}_bucket")
    orders = int(came[f"{ANSWER}_count", ""])
    return RoundTrips(streams, orders, mean_ms(ANSWER), 1000 * _median(buckets), mean_ms(ROUND_TRIP), mean_ms(SETTLED))


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
While it lasts, the verifier settles the step before (hands its tokens out, counts them, learns), which takes its time
without any drafts too: the rest of the median is what is added to a step.

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
    out: Annotated[Path, typer.Option(help="The page.")] = RESULTS / "round-trip-cpu.md",
) -> None:
    """Measures what the way to a speculator and back adds to a step."""
    console = Console(stderr=True)
    machine = describe_machine(0)
    with exit_on(STACK_FAILURES, console), console.status("asking the stack"):
        up = UpSettings(llm=llm, ssm=tuple(ssm or ()))
        rows = asyncio.run(measure_round_trips(up, read_prompts(PROMPTS), streams or STREAMS, new_tokens))
    out.write_text(page(rows, shown_command("benchmarks.round_trip", sys.argv[1:]), machine), encoding="utf-8")
    for row in rows:
        console.print(f"{row.streams} streams: round trip {row.median_ms:.2f} ms, added {row.added_ms:.2f}")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    app()
