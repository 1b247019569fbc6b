"""The acceptance tables: how many tokens a step of the LLM yields, by draft, on held-out prompts.

make bench-acceptance
python -m benchmarks.acceptance --llm my-llm --ssm boosted-1 --ssm boosted-2 --prompts chat=chat.jsonl --out page.md
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.acceptance.bench import Setup
from benchmarks.acceptance.lines import draft_lines
from benchmarks.acceptance.page import acceptance_page
from benchmarks.acceptance.plot import draw_plot
from benchmarks.acceptance.results import Conditions, Results, raw_numbers
from benchmarks.acceptance.success import success_rows
from benchmarks.acceptance.tasks import Continue, Covered, Describe, Task, Walked, Workers, plan
from benchmarks.failures import exit_on
from benchmarks.machine import describe_machine
from benchmarks.markdown import shown_command
from services.common.lifecycle import StartupError
from services.common.model_facts import ModelFacts, ModelMismatch
from services.common.model_files import ModelFilesError, resolve_model
from services.common.prompt_files import BadPrompts, read_prompts
from services.launcher.settings import UpSettings, embedded_ssms

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
PROMPT_SETS = [HERE.parent / "prompts" / f"{name}.jsonl" for name in ("gsm8k", "tinystories", "webquestions")]
DEFAULTS = UpSettings()

# What a user can put right; each is one line.
USAGE_ERRORS = (BadPrompts, ModelFilesError, ModelMismatch, StartupError)


def measure(
    workers: Workers, setup: Setup, prompts: Mapping[str, tuple[str, ...]], console: Console
) -> tuple[Results, Mapping[str, ModelFacts]]:
    """Everything that the page shows, and what the models are."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    results = Results(draft_lines(setup.sets), success_rows(setup.sets))
    # Drawn once a second: the picture shares the cores with what is measured.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        bar = progress.add_task("the LLM's own texts", total=len(prompts), rate="")
        (facts,) = workers.run([Describe()])
        texts = {}
        for continued in workers.run([Continue(name, asked) for name, asked in prompts.items()]):
            texts[continued.name] = continued
            progress.advance(bar)
        results.sets.update((name, texts[name]) for name in prompts)
        tasks: Sequence[Task[Walked | Covered]] = plan(setup, results.sets.values())
        progress.reset(bar, total=len(tasks))
        started, tokens = time.monotonic(), 0
        for measured in workers.run(tasks):
            results.add(measured)
            tokens += measured.tokens
            rate = f"{tokens / (time.monotonic() - started):,.0f} tokens/s"
            progress.update(bar, advance=1, description=f"{measured.prompts} {measured.rule}", rate=rate)
    return results, facts


def read_prompt_sets(options: Sequence[str], most: int) -> dict[str, tuple[str, ...]]:
    """The first prompts of each NAME=FILE, by name.

    Raises:
        BadPrompts: an option has another form or repeats a name, or a file cannot be used.
    """
    sets: dict[str, tuple[str, ...]] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise BadPrompts(f"--prompts {option}: give NAME=FILE, such as chat=chat.jsonl")
        if name in sets:
            raise BadPrompts(f"--prompts {option}: there is a set {name} already; give each its own name")
        sets[name] = read_prompts(Path(path))[:most]
    return sets


def write_results(out: Path, results: Results, conditions: Conditions) -> None:
    """The page, the raw numbers (.json) and the picture (.svg), side by side."""
    out.parent.mkdir(parents=True, exist_ok=True)
    chart = out.with_suffix(".svg")
    draw_plot(results, chart)
    out.write_text(acceptance_page(results, conditions, chart.name), encoding="utf-8")
    out.with_suffix(".json").write_text(raw_numbers(conditions, results), encoding="utf-8")


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Large model: a folder or a hub id.")] = DEFAULTS.llm,
    ssm: Annotated[
        list[str] | None,
        typer.Option(
            help="SSM that drafts; repeatable, in the order of boosting. The first is also measured alone. "
            "[default: models/...]"
        ),
    ] = None,
    independent: Annotated[
        list[str] | None,
        typer.Option(help="SSM of a second set to compare the first with, tuned without boosting; repeatable."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help='NAME=FILE of JSON Lines of {"prompt": ...}; repeatable. [default: the sets of benchmarks/prompts]'
        ),
    ] = None,
    prompts_per_set: Annotated[
        int, typer.Option(min=1, help="How many prompts of each file, from its beginning; the time is proportional.")
    ] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of a continuation.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled texts; another one gives others.")] = 0,
    beam: Annotated[int, typer.Option(min=1, max=64, help="Nodes that best-first growth expands at each depth.")] = 4,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes that share the work, each with all models; 0: one for each core.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="The page; .json and .svg go beside it.")] = RESULTS / "acceptance.md",
) -> None:
    """Counts how many tokens the LLM's steps yield by draft, and writes tables, raw numbers and a picture.

    The tables are SpecInfer's (arXiv 2305.09781): how often k candidates have the LLM's token; tokens per LLM step by
    size of the tree, for static and best-first trees, one SSM and merged sets; naive sampling, MSS and shared noise.
    Nothing is timed: the machine may do other things meanwhile.
    """
    console = Console(stderr=True)
    cores = len(os.sched_getaffinity(0))
    processes = processes or (cores if device == "cpu" else 1)
    setup = Setup(
        llm=llm,
        boosted=tuple(ssm or embedded_ssms(llm)),
        independent=tuple(independent or ()),
        new_tokens=new_tokens,
        seed=seed,
        sequences=prompts_per_set,
        beam=beam,
        device=device,
        threads=max(1, cores // processes),
    )
    with exit_on(USAGE_ERRORS, console, 2):
        asked = read_prompt_sets(prompts or [f"{path.stem}={path}" for path in PROMPT_SETS], prompts_per_set)
        for model in (setup.llm, *setup.boosted, *setup.independent):
            resolve_model(model)
        with Workers(setup, processes) as workers:
            results, facts = measure(workers, setup, asked, console)
    command = shown_command("benchmarks.acceptance", sys.argv[1:])
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_results(
        out, results, Conditions(command, date, describe_machine(setup.threads), facts, new_tokens, seed, beam)
    )
    console.print(f"wrote {out}")


if __name__ == "__main__":
    app()
