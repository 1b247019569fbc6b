"""Which drafts are fastest for one stream on this machine: a sweep over the settings that shape them.

    python -m benchmarks.tune_drafts --nodes 4 --nodes 8 --depth 4 --confidence 0.05 --width 1,1,1

Asks the verifier over gRPC. A process is restarted only when its own settings change: the speculator for each pair of
beam and confidence, the verifier for each shape.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.client import RequestFailed, VerifierClient
from benchmarks.configurations import MIXED_PROMPTS, NO_LOOKUP, static_drafts
from benchmarks.failures import exit_on
from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown_table, shown_command
from benchmarks.samples import Answer
from benchmarks.stack import running_service
from services.common.grpc_setup import channel
from services.common.model_files import ModelFilesError, resolve_model
from services.common.prompt_files import BadPrompts, read_prompts
from services.common.tls import INSECURE
from services.launcher.settings import UpSettings
from services.launcher.supervisor import ServiceFailed

DEFAULTS = UpSettings()
WARM_UP_TOKENS = 16
# What is tried unless the flags say otherwise.
SSMS = list(DEFAULTS.drafting[:1])
NODES = [4, 8, 12, 16]
DEPTHS = [4, 6, 8]
CONFIDENCES = [0.02, 0.05, 0.1]
BEAMS = [2, 4]
WIDTHS = ["1,1,1", "1,1,1,1", "2,1,1", "2,2,1,1"]


@dataclass(frozen=True)
class DraftShape:
    """Settings of both services. beam and confidence are None for static trees, which do not use them."""

    verifier: dict[str, Any]
    beam: int | None = None
    confidence: float | None = None

    def speculator(self) -> dict[str, Any]:
        values = {"beam": self.beam, "min_confidence": self.confidence}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """What a shape came to over all prompts. ms_per_token: median over prompts."""

    shape: DraftShape
    ms_per_token: float
    tokens_per_step: float

    @classmethod
    def of(cls, shape: DraftShape, answers: Sequence[Answer]) -> Outcome:
        tokens, steps = sum(a.tokens for a in answers), sum(a.llm_steps for a in answers)
        return cls(shape, median(answer.ms_per_token for answer in answers), tokens / steps)


PLAIN = DraftShape({"draft_nodes": 0})


@dataclass(frozen=True)
class Sweep:
    """Asks every prompt of each shape once. on_line: gets log lines of the services."""

    llm: str
    ssms: tuple[str, ...]
    prompts: tuple[str, ...]
    new_tokens: int
    threads: int
    on_line: Callable[[str], None]

    async def outcomes(self, shapes: Sequence[DraftShape]) -> AsyncIterator[Outcome]:
        """One for each shape, in their order."""
        for settings, group in itertools.groupby(shapes, DraftShape.speculator):
            options = {"ssm": self.ssms, "device": "cpu"} | NO_LOOKUP | settings
            async with running_service("speculator", options, self.on_line) as speculator:
                for shape in group:
                    yield await self._outcome(shape, speculator)

    async def _outcome(self, shape: DraftShape, speculator: str) -> Outcome:
        options = {"llm": self.llm, "device": "cpu", "threads": self.threads, "speculator": (speculator,)}
        async with running_service("verifier", options | shape.verifier, self.on_line) as verifier:
            with channel(verifier, INSECURE) as connection:
                client = VerifierClient(connection, self.llm)
                await asyncio.to_thread(client.complete, self.prompts[0], min(WARM_UP_TOKENS, self.new_tokens))
                answers = [await asyncio.to_thread(client.complete, text, self.new_tokens) for text in self.prompts]
        return Outcome.of(shape, answers)


def shapes(
    nodes: Sequence[int],
    depths: Sequence[int],
    confidences: Sequence[float],
    beams: Sequence[int],
    widths: Sequence[Sequence[int]],
) -> Iterator[DraftShape]:
    """Plain decoding, the static trees, then every combination of the others that differs from one before it."""
    yield PLAIN
    for chosen in widths:
        yield DraftShape(static_drafts(chosen))
    # No tree is deeper than its nodes: what differs beyond that is the same shape.
    bounds = dict.fromkeys((count, min(depth, count)) for depth in depths for count in nodes)
    for confidence, beam, (count, depth) in itertools.product(confidences, beams, bounds):
        yield DraftShape({"draft_nodes": count, "draft_depth": depth, "draft_always": True}, beam, confidence)


def page(outcomes: Sequence[Outcome], command: str, machine: dict[str, str], prompts: int, new_tokens: int) -> str:
    """The table, fastest first, in Markdown."""
    plain = next(outcome for outcome in outcomes if outcome.shape is PLAIN)
    rows = [
        [
            _title(outcome.shape),
            *_cells(outcome.shape),
            f"{outcome.tokens_per_step:.2f}",
            f"{outcome.ms_per_token:.2f}",
            f"{plain.ms_per_token / outcome.ms_per_token:.2f}",
        ]
        for outcome in sorted(outcomes, key=lambda outcome: outcome.ms_per_token)
    ]
    header = ["drafts", "nodes", "depth", "beam", "min confidence", "tokens per LLM step", "ms per token", "× plain"]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = "\n".join(f"- {name}: {fact}" for name, fact in machine.items())
    method = (
        f"One stream, greedy, {prompts} prompts of up to {new_tokens} new tokens, each asked once of the verifier over "
        "gRPC; ms per token is the median over prompts. Neighbouring rows may have changed places by chance."
    )
    intro = f"Made on {date} by `{command}`. {method}"
    return f"# Drafts for one stream, cpu\n\n{intro}\n\n{markdown_table(header, rows)}\n\n## Machine\n\n{facts}\n"


def _title(shape: DraftShape) -> str:
    if shape is PLAIN:
        return "none"
    if widths := shape.verifier.get("draft_width"):
        return f"static <{','.join(map(str, widths))}>"
    return "best-first"


def _cells(shape: DraftShape) -> list[str]:
    values = [shape.verifier.get("draft_nodes"), shape.verifier.get("draft_depth"), shape.beam, shape.confidence]
    return ["" if value is None else f"{value:g}" for value in values]


def _parse_widths(texts: Sequence[str]) -> list[list[int]]:
    try:
        parsed = [[int(part) for part in text.split(",")] for text in texts]
    except ValueError:
        raise typer.BadParameter(f"--width: got {list(texts)}; each must be numbers such as 2,1,1") from None
    if any(width < 1 for widths in parsed for width in widths):
        raise typer.BadParameter(f"--width: got {list(texts)}; every width must be at least 1")
    return parsed


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Large model: a folder or a hub id.")] = DEFAULTS.llm,
    ssm: Annotated[list[str], typer.Option(help="Small model that drafts; repeatable.")] = SSMS,
    nodes: Annotated[list[int], typer.Option(min=1, help="draft_nodes to try; repeatable.")] = NODES,
    depth: Annotated[list[int], typer.Option(min=1, help="draft_depth to try; repeatable.")] = DEPTHS,
    confidence: Annotated[
        list[float], typer.Option(min=0, max=1, help="min_confidence to try; repeatable.")
    ] = CONFIDENCES,
    beam: Annotated[list[int], typer.Option(min=1, help="beam to try; repeatable.")] = BEAMS,
    width: Annotated[list[str], typer.Option(help="Static tree to try, as widths by depth; repeatable.")] = WIDTHS,
    prompts: Annotated[Path, typer.Option(help='JSON Lines of {"prompt": ...}.')] = MIXED_PROMPTS,
    every: Annotated[int, typer.Option(min=1, help="Take every n-th prompt.")] = 2,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of the large model; 0: all cores.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table to this file too.")] = None,
) -> None:
    """Measures one stream with every combination of draft settings, and prints a table, fastest first."""
    console = Console(stderr=True)
    machine = describe_machine(threads)
    tried = list(shapes(nodes, depth, confidence, beam, _parse_widths(width)))
    with exit_on((BadPrompts, ModelFilesError), console, 2), exit_on((ServiceFailed, RequestFailed), console):
        asked = read_prompts(prompts)[::every]
        for model in (llm, *ssm):
            resolve_model(model)
        sweep = Sweep(llm, tuple(ssm), asked, new_tokens, threads, lambda line: console.print(line, style="dim"))
        outcomes = asyncio.run(_collect(sweep, tried, console))
    text = page(outcomes, shown_command("benchmarks.tune_drafts", sys.argv[1:]), machine, len(asked), new_tokens)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


async def _collect(sweep: Sweep, tried: Sequence[DraftShape], console: Console) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with Progress(console=console, refresh_per_second=1) as progress:
        bar = progress.add_task("measuring", total=len(tried))
        async for outcome in sweep.outcomes(tried):
            outcomes.append(outcome)
            progress.advance(bar)
    return outcomes


if __name__ == "__main__":
    app()
