"""The speed table: plain, sequence and tree speculation through the whole stack, against Hugging Face `generate`.

    make bench
    python -m benchmarks.serving --llm my-llm --ssm my-ssm --out results.md

Everything runs with the same models and prompts in one go, so that the ratios do not depend on the day.
"""

from __future__ import annotations

import asyncio
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.chart import draw_chart
from benchmarks.client import RequestFailed
from benchmarks.configurations import (
    BEST_FIRST,
    HF,
    HF_ASSISTED,
    HF_ASSISTED_BF16,
    HF_BF16,
    LOOKUP,
    MIXED_PROMPTS,
    PLAIN,
    Configuration,
    merged_trees,
    sequence_speculation,
    static_tree,
)
from benchmarks.machine import describe_machine
from benchmarks.raw import raw_numbers
from benchmarks.report import Conditions, serving_page, shown_command
from benchmarks.rounds import Benchmark, Measurements, Task
from benchmarks.summary import summarize, summarize_latency
from benchmarks.workers import WorkerFailed
from services.common.model_files import ModelFilesError, resolve_model
from services.common.prompt_files import BadPrompts, read_prompts
from services.common.settings import SettingsError
from services.launcher.redis_server import NoRedisServer
from services.launcher.settings import UpSettings, embedded_ssms
from services.launcher.supervisor import ServiceFailed

RESULTS = Path(__file__).parent / "results"
DEFAULTS = UpSettings()

# What a user can put right, and what went wrong while measuring; each is one line.
USAGE_ERRORS = (BadPrompts, ModelFilesError, SettingsError, NoRedisServer)
RUN_ERRORS = (ServiceFailed, RequestFailed, WorkerFailed)


async def run(
    task: Task, configurations: Sequence[Configuration], try_bf16: bool, console: Console
) -> tuple[list[Configuration], Measurements]:
    """Measures everything that the page shows; the configurations that took part come back with it."""
    chosen = list(configurations)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn once a second: the picture shares the cores with what is measured.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        bar = progress.add_task("trying bf16" if try_bf16 else "starting", total=None)
        benchmark = Benchmark(
            task,
            lambda line: console.print(line, markup=False, highlight=False, style="dim"),
            lambda configuration: progress.update(bar, advance=1, description=configuration.key),
        )
        if try_bf16:
            for bf16, fp32 in ((HF_BF16, HF), (HF_ASSISTED_BF16, HF_ASSISTED)):
                if await benchmark.is_clearly_faster(bf16, fp32):
                    chosen.append(bf16)
        progress.update(bar, total=task.rounds * len(chosen) * len(task.prompts))
        await benchmark.run_rounds(chosen)
        progress.update(bar, description="step times")
        await benchmark.measure_steps()
    return chosen, benchmark.measured


def write_results(
    out: Path, configurations: Sequence[Configuration], measured: Measurements, conditions: Conditions
) -> None:
    """The page, the raw numbers (.json) and the picture (.svg), side by side."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = summarize(configurations, measured.samples)
    latency = summarize_latency(configurations, measured.latency)
    chart = out.with_suffix(".svg")
    draw_chart(rows, chart)
    out.write_text(serving_page(rows, latency, measured.steps, conditions, chart.name), encoding="utf-8")
    out.with_suffix(".json").write_text(raw_numbers(conditions, rows, measured), encoding="utf-8")


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Large model: a folder or a hub id.")] = DEFAULTS.llm,
    ssm: Annotated[
        list[str] | None,
        typer.Option(help="Small model that drafts; repeatable. Hugging Face gets the first. [default: models/...]"),
    ] = None,
    prompts: Annotated[Path, typer.Option(help='JSON Lines of {"prompt": ...}.')] = MIXED_PROMPTS,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every configuration answers all prompts.")] = 3,
    device: Annotated[str, typer.Option(help="Where all models run: cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of the large model; 0: all cores.")] = 0,
    sequence_length: Annotated[int, typer.Option(min=1, help="Length of the chains of sequence speculation.")] = 4,
    static_width: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Children of a node at each depth of the static tree; repeatable. [default: 2 2 1 1]"),
    ] = None,
    bf16: Annotated[bool, typer.Option(help="Add Hugging Face in bf16 where a trial finds it faster.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="The page; .json and .svg go beside it. [default: benchmarks/results/serving-DEVICE.md]"),
    ] = None,
) -> None:
    """Measures the serving speed of a pair of models and writes a table.

    Each round starts every configuration afresh: plain decoding, sequence speculation and tree speculation of the whole
    stack through the gateway, then Hugging Face's generate and assisted generate. Leave the machine alone meanwhile.
    """
    console = Console(stderr=True)
    tree = static_tree(static_width or [2, 1, 1, 1])
    ours = [PLAIN, sequence_speculation(sequence_length), tree, BEST_FIRST, LOOKUP]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = describe_machine(threads)
    try:
        task = Task(llm, tuple(ssm or embedded_ssms(llm)), read_prompts(prompts), new_tokens, rounds, device, threads)
        for model in (task.llm, *task.ssms):
            resolve_model(model)
        merged = merged_trees(len(task.ssms)) if len(task.ssms) > 1 else []
        configurations = [*ours, *merged, HF, HF_ASSISTED]
        chosen, measured = asyncio.run(run(task, configurations, bf16, console))
    except (*USAGE_ERRORS, *RUN_ERRORS) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, USAGE_ERRORS) else 1) from None
    command = shown_command("benchmarks.serving", sys.argv[1:])
    page = out or RESULTS / f"serving-{device.partition(':')[0]}.md"
    conditions = Conditions(command, date, device, machine, len(task.prompts), rounds, new_tokens)
    write_results(page, chosen, measured, conditions)
    console.print(f"wrote {page}")


if __name__ == "__main__":
    app()
