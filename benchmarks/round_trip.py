"""What a step waits for its drafts, and how much of that is the drafting itself.

    python -m benchmarks.round_trip --streams 1 --streams 8

The whole stack as processes on one machine, every step drafting. The verifier's own clock says how long its steps
waited, the speculator's how long it worked on their messages; the rest is the round trip: gRPC, thread changes, and the
verifier's bookkeeping of trees.
"""

from __future__ import annotations

import asyncio
import datetime
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.client import CompletionClient, Prompt, RequestFailed
from benchmarks.load import measure_load
from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown_table, shown_command
from benchmarks.stack import free_port, running_stack
from services.common.model_files import ModelFilesError, resolve_model
from services.common.prompt_files import read_prompts
from services.common.settings import SettingsError
from services.gateway.tokenizer import GatewayTokenizer
from services.launcher.plan import LOOPBACK
from services.launcher.redis_server import NoRedisServer
from services.launcher.settings import EMBEDDED_LLM, UpSettings
from services.launcher.supervisor import ServiceFailed

RESULTS = Path(__file__).with_name("results")
PROMPTS = Path(__file__).with_name("prompts") / "mixed.jsonl"
STREAMS = (1, 8, 32)
WAITED, WORKED = "specserve_verifier_draft_seconds", "specserve_speculator_answer_seconds"


@dataclass(frozen=True)
class RoundTrips:
    """Milliseconds of a step, means over all steps: waited for drafts, and worked on by the speculator."""

    streams: int
    steps: int
    waited_ms: float
    worked_ms: float

    @property
    def added_ms(self) -> float:
        return self.waited_ms - self.worked_ms


@dataclass(frozen=True)
class Clocks:
    """Seconds since the start, and the steps that waited."""

    waited: float
    steps: float
    worked: float


class Metrics:
    """Reads both services' metrics."""

    def __init__(self, verifier_port: int, speculator_port: int) -> None:
        self._verifier_port, self._speculator_port = verifier_port, speculator_port

    def read(self) -> Clocks:
        verifier, speculator = _samples(self._verifier_port), _samples(self._speculator_port)
        return Clocks(verifier[f"{WAITED}_sum"], verifier[f"{WAITED}_count"], speculator[f"{WORKED}_sum"])


def _samples(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}


async def measure_round_trips(
    up: UpSettings, prompts: Sequence[str], streams: Sequence[int], new_tokens: int
) -> list[RoundTrips]:
    """One running stack, asked with each number of streams at once.

    Raises:
        ServiceFailed, NoRedisServer, ModelFilesError: a part cannot start. RequestFailed: an answer failed.
    """
    tokenizer = GatewayTokenizer.from_folder(resolve_model(up.llm))
    ids: list[Prompt] = [tokenizer.encode(prompt) for prompt in prompts]
    ports = free_port(), free_port()
    options = {
        "verifier": {"draft_always": True, "metrics_port": ports[0]},
        "speculator": {"metrics_port": ports[1]},
    }
    metrics = Metrics(*ports)
    async with running_stack(up, options, lambda _: None) as stack:
        client = await asyncio.to_thread(CompletionClient.connect, stack.url)
        await asyncio.to_thread(measure_load, client, "", ids, new_tokens, 1, 0)
        found = []
        for count in streams:
            before = metrics.read()
            await asyncio.to_thread(measure_load, client, "", ids, new_tokens, count, 0)
            found.append(_between(count, before, metrics.read()))
    return found


def _between(streams: int, before: Clocks, after: Clocks) -> RoundTrips:
    steps = after.steps - before.steps
    waited, worked = after.waited - before.waited, after.worked - before.worked
    return RoundTrips(streams, int(steps), 1000 * waited / steps, 1000 * worked / steps)


def page(rows: Sequence[RoundTrips], command: str, machine: dict[str, str]) -> str:
    header = ("streams", "steps", "a step waits, ms", "the speculator works, ms", "added, ms")
    cells = [
        (str(row.streams), str(row.steps), *(f"{ms:.2f}" for ms in (row.waited_ms, row.worked_ms, row.added_ms)))
        for row in rows
    ]
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"""# Drafts: what the round trip adds

`{command}`, {date}. The embedded models, drafting in every step, asked through the gateway; means over all steps.
A step waits from its plan until its trees are merged; meanwhile it also hands out the last step's tokens.

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
    """Measures what a step waits for its drafts beside the drafting itself."""
    console = Console(stderr=True)
    machine = describe_machine(0)
    try:
        with console.status("asking the stack"):
            up = UpSettings(llm=llm, ssm=tuple(ssm or ()))
            rows = asyncio.run(measure_round_trips(up, read_prompts(PROMPTS), streams or STREAMS, new_tokens))
    except (ServiceFailed, NoRedisServer, ModelFilesError, SettingsError, RequestFailed) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    out.write_text(page(rows, shown_command("benchmarks.round_trip", sys.argv[1:]), machine), encoding="utf-8")
    for row in rows:
        console.print(
            f"{row.streams} streams: {row.waited_ms:.2f} ms, drafting {row.worked_ms:.2f}, added {row.added_ms:.2f}"
        )
    console.print(f"wrote {out}")


if __name__ == "__main__":
    app()
