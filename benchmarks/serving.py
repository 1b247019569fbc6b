"""The serving table: our whole stack beside Hugging Face, llama.cpp and vLLM, in one run on one machine.

    make bench-peers && make bench
    python -m benchmarks.serving --quick
    python -m benchmarks.serving --llm my-llm --ssm my-ssm --out results.md

Everything runs with the same models and prompts in one go, so that the ratios do not depend on the day.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.chart import draw_chart
from benchmarks.client import RequestFailed
from benchmarks.configurations import MIXED_PROMPTS
from benchmarks.failures import exit_on
from benchmarks.gateway import GatewayLoad, measure_all
from benchmarks.inflate import MEMORY_BOUND_PARAMETERS, CannotInflate, inflate
from benchmarks.lineup import ENGINES, Lineup
from benchmarks.machine import describe_machine
from benchmarks.markdown import shown_command
from benchmarks.peers.gguf_file import CannotConvert
from benchmarks.peers.home import PEERS, find_peers
from benchmarks.raw import raw_numbers
from benchmarks.report import Conditions, serving_page
from benchmarks.rounds import Benchmark, Task
from benchmarks.servers import Models, Servers
from benchmarks.target import Target
from benchmarks.workers import WorkerFailed
from services.common.model_files import ModelFilesError, resolve_model
from services.common.prompt_files import BadPrompts, read_prompts
from services.common.settings import SettingsError
from services.launcher.redis_server import NoRedisServer
from services.launcher.settings import UpSettings, embedded_ssms
from services.launcher.supervisor import ServiceFailed

RESULTS = Path(__file__).parent / "results"
DEFAULTS = UpSettings()
STREAMS = (8, 32)
OPEN_STREAMS = (1, 500)
# What --quick leaves: enough to see that everything runs.
QUICK_EVERY, QUICK_TOKENS, QUICK_ROUNDS = 8, 32, 1

# What a user can put right, and what went wrong while measuring; each is one line.
USAGE_ERRORS = (BadPrompts, CannotConvert, CannotInflate, ModelFilesError, SettingsError, NoRedisServer)
RUN_ERRORS = (ServiceFailed, RequestFailed, WorkerFailed)


async def measure_target(
    task: Task, lineup: Lineup, inflated: str, streams: Sequence[int], progress: Progress, work: Path
) -> Target:
    """Everything that the page shows of one large model. work: for converted models."""
    name = Path(task.models.llm).name
    bar = progress.add_task(f"{name}: trying settings", total=None)

    def show(line: str) -> None:
        progress.console.print(line, markup=False, highlight=False, style="dim")

    async with Servers(task.models, lineup.peers, work, max([1, *streams]), show) as servers:
        benchmark = Benchmark(
            task, servers, lambda key: progress.update(bar, advance=1, description=f"{name}: {key}"), show
        )
        chosen = await lineup.choose(benchmark, inflated=bool(inflated))
        crowd = [configuration for configuration in chosen if lineup.takes_many(configuration)] if streams else []
        learners = [configuration for configuration in chosen if configuration.learns]
        loads = [1, *streams]
        total = task.rounds * (len(chosen) * len(task.prompts) + len(crowd) * len(streams)) + len(learners) * len(loads)
        progress.update(bar, total=total, completed=0)
        await benchmark.learn(learners, loads)
        await benchmark.run_rounds(chosen)
        await benchmark.run_load(crowd, streams)
        progress.update(bar, description=f"{name}: step times")
        await benchmark.measure_steps([c for c in chosen if lineup.has_step_times(c)])
    return Target(name, inflated, tuple(chosen), benchmark.measured)


async def run(
    task: Task, lineup: Lineup, parameters: int, streams: Sequence[int], work: Path, console: Console
) -> tuple[list[Target], list[GatewayLoad]]:
    """The targets: the LLM, and where parameters > 0 the LLM inflated to as many; then the gateway alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    targets = []
    # Drawn once a second: the picture shares the cores with what is measured.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        targets.append(await measure_target(task, lineup, "", streams, progress, work))
        if parameters:
            large, inflated = inflated_task(task, parameters, work)
            targets.append(await measure_target(large, lineup, inflated, streams, progress, work))
        bar = progress.add_task("the gateway alone", total=None)
        gateway = await measure_all(task.models.llm, OPEN_STREAMS) if streams else []
        progress.update(bar, total=1, completed=1)
    return targets, gateway


def inflated_task(task: Task, parameters: int, work: Path) -> tuple[Task, str]:
    """The task with the LLM inflated, and what the page says of that."""
    source = resolve_model(task.models.llm)
    large = work / f"{source.name}-inflated"
    shape = inflate(source, large, parameters)
    models = dataclasses.replace(task.models, llm=str(large), ssms=task.models.ssms[:1])
    return dataclasses.replace(task, models=models), (
        f"Inflated: the text of {source.name} at the cost of a larger model, {shape.copies} times as wide and with "
        f"{shape.layers} layers (benchmarks/inflate.py). It shows speed and nothing else."
    )


@contextmanager
def model_folder(home: Path) -> Iterator[Path]:
    """An empty folder for converted models, removed afterwards.

    Its name is always the same: vLLM keeps compiled code by the path of a model.
    """
    folder = home / "models"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_results(out: Path, targets: Sequence[Target], gateway: Sequence[GatewayLoad], conditions: Conditions) -> None:
    """The page, the raw numbers (.json) and the picture (.svg), side by side."""
    out.parent.mkdir(parents=True, exist_ok=True)
    chart = out.with_suffix(".svg")
    draw_chart({target.name: target.rows for target in targets}, chart)
    out.write_text(serving_page(targets, gateway, conditions, chart.name), encoding="utf-8")
    out.with_suffix(".json").write_text(raw_numbers(conditions, targets, gateway), encoding="utf-8")


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Large model: a folder or a hub id.")] = DEFAULTS.llm,
    ssm: Annotated[
        list[str] | None,
        typer.Option(help="Small model that drafts; repeatable. Peers get the first. [default: models/...]"),
    ] = None,
    inflate_to: Annotated[
        int, typer.Option(min=0, help="Measure also the LLM inflated to about as many parameters; 0: do not.")
    ] = MEMORY_BOUND_PARAMETERS,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Leave out other engines: {', '.join(ENGINES)}; repeatable. Two rows of ours always run."),
    ] = None,
    peers: Annotated[
        Path,
        typer.Option(help="Where `make bench-peers` installed llama.cpp and vLLM; models are converted there too."),
    ] = PEERS,
    prompts: Annotated[Path, typer.Option(help='JSON Lines of {"prompt": ...}.')] = MIXED_PROMPTS,
    every: Annotated[int, typer.Option(min=1, help="Take every n-th prompt.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every configuration answers all prompts.")] = 2,
    streams: Annotated[
        list[int] | None, typer.Option(min=0, help="Streams at once; repeatable; 0: none. [default: 8 32]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few prompts, one round: shows that everything runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where all models run: cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of the large model; 0: all cores.")] = 0,
    sequence_length: Annotated[int, typer.Option(min=1, help="Length of the chains of sequence speculation.")] = 4,
    static_width: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Children of a node at each depth of the static tree; repeatable. [default: 2 1 1 1]"),
    ] = None,
    trials: Annotated[
        bool, typer.Option(help="Try settings of the peers first; without, each has its first setting.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="The page; .json and .svg go beside it. [default: benchmarks/results/serving-DEVICE.md]"),
    ] = None,
) -> None:
    """Measures the serving speed of a pair of models, side by side with the peers that are installed.

    For each target (the LLM, and the LLM inflated until a step is bound by memory) the peers' settings are tried, then
    all configurations answer the same prompts in rounds, alone and with several streams at once; step times and the
    gateway's share come last. Leave the machine alone meanwhile: llama.cpp above all loses its speed beside other work.
    """
    console = Console(stderr=True)
    if quick:
        every, new_tokens, rounds = QUICK_EVERY, QUICK_TOKENS, QUICK_ROUNDS
    chosen = [count for count in (streams or STREAMS) if count]
    found = find_peers(peers)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = describe_machine(threads) | {"peers": ", ".join(found.versions.values()) or "none installed"}
    with exit_on(USAGE_ERRORS, console, 2), exit_on(RUN_ERRORS, console):
        lineup = Lineup(found, tuple(only or ENGINES), sequence_length, tuple(static_width or (2, 1, 1, 1)), trials)
        models = Models(llm, tuple(ssm or embedded_ssms(llm)), device, threads)
        task = Task(models, read_prompts(prompts)[::every], new_tokens, rounds)
        for model in (models.llm, *models.ssms):
            resolve_model(model)
        with model_folder(peers.resolve()) as work:
            targets, gateway = asyncio.run(run(task, lineup, inflate_to, chosen, work, console))
    command = shown_command("benchmarks.serving", sys.argv[1:])
    page = out or RESULTS / f"serving-{device.partition(':')[0]}.md"
    conditions = Conditions(command, date, device, machine, len(task.prompts), rounds, new_tokens, lineup.absent)
    write_results(page, targets, gateway, conditions)
    console.print(f"wrote {page}")


if __name__ == "__main__":
    app()
