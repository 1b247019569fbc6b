"""Whether the default is ever slower than plain decoding, by the load.

    python -m benchmarks.drafting_pays --streams 1 --streams 32

The whole stack with its default settings, asked through the gateway. At each load the same requests are made with
drafts and, with `speculative: false`, without, in turns of with, without, without, with: neither gains from its place.
The budget of drafts learns on the way, from nothing at the start: what that costs counts.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.client import CompletionClient, Prompt
from benchmarks.failures import STACK_FAILURES, exit_on
from benchmarks.inflate import INFLATED_FROM
from benchmarks.load import REQUESTS_PER_STREAM, rate_of_all, stream_all
from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown_table, shown_command
from benchmarks.stack import ServiceOptions, running_stack
from benchmarks.summary import Quartiles
from services.common.model_files import resolve_model
from services.common.prompt_files import read_prompts
from services.gateway.tokenizer import GatewayTokenizer
from services.launcher.settings import EMBEDDED_LLM, UpSettings

RESULTS = Path(__file__).with_name("results")
PROMPTS = tuple(Path(__file__).with_name("prompts") / f"{name}.jsonl" for name in ("tinystories", "gsm8k"))
STREAMS = (1, 2, 4, 8, 16, 32)
LEAST_REQUESTS = 16  # of an arm
# With drafts and without: what the machine does meanwhile, and what the budget has learned, falls on both.
ORDER = (True, False, False, True)
# Prompts come again and again, so that an index of earlier outputs would draft them whole.
OPTIONS: ServiceOptions = {"verifier": {"step_times": "none"}, "speculator": {"suffix_index_tokens": 0}}


@dataclass(frozen=True)
class Turn:
    """Tokens per second of the same requests with drafts and without.

    same: of how many of the requests all texts are the same.
    """

    streams: int
    drafting: float
    plain: float
    requests: int
    same: int

    @property
    def ratio(self) -> float:
        return self.drafting / self.plain


async def measure_turns(
    up: UpSettings,
    prompts: Sequence[str],
    streams: Sequence[int],
    new_tokens: int,
    turns: int,
    temperature: float,
    options: ServiceOptions = OPTIONS,
    on_arm: Callable[[], None] = lambda: None,
) -> list[Turn]:
    """One running stack, asked at each load with drafts and without.

    Raises:
        ServiceFailed, NoRedisServer, ModelFilesError: a part cannot start. RequestFailed: an answer failed.
    """
    tokenizer = GatewayTokenizer.from_folder(resolve_model(up.llm))
    ids: list[Prompt] = [tokenizer.encode(prompt) for prompt in prompts]
    found: list[Turn] = []
    async with running_stack(up, options, lambda _: None) as stack:
        client = await asyncio.to_thread(CompletionClient.connect, stack.url)
        for count in streams:
            for turn in range(turns):
                first = len(found) * LEAST_REQUESTS
                requests = max(LEAST_REQUESTS, REQUESTS_PER_STREAM * count)
                wanted = [ids[(first + place) % len(ids)] for place in range(requests)]
                fields: dict[str, object] = {"temperature": temperature, "seed": turn}
                found.append(await asyncio.to_thread(_turn, client, fields, wanted, new_tokens, count, on_arm))
    return found


def _turn(
    client: CompletionClient,
    fields: dict[str, object],
    prompts: Sequence[Prompt],
    new_tokens: int,
    streams: int,
    on_arm: Callable[[], None],
) -> Turn:
    rates: dict[bool, list[float]] = {True: [], False: []}
    texts: list[list[str]] = []
    for drafting in ORDER:
        asking = replace(client, fields={**fields, "speculative": drafting})
        answers = stream_all(asking, prompts, new_tokens, streams)
        rates[drafting].append(rate_of_all(answers))
        texts.append([stream.answer().text for stream in answers])
        on_arm()
    same = sum(len(set(own)) == 1 for own in zip(*texts, strict=True))
    return Turn(streams, harmonic_mean(rates[True]), harmonic_mean(rates[False]), len(prompts), same)


def page(turns: Sequence[Turn], models: str, command: str, machine: dict[str, str]) -> str:
    """The first turn of a load, in which it is new to the budget, stands beside all."""
    header = (
        "streams",
        "turns",
        "tokens/s with drafts",
        "without",
        "with / without, all turns",
        "standard error",
        "median [quartiles]",
        "first turn",
        "same texts",
    )
    rows = []
    for streams in dict.fromkeys(turn.streams for turn in turns):
        own = [turn for turn in turns if turn.streams == streams]
        ratios = [turn.ratio for turn in own]
        drafting, plain = np.mean([turn.drafting for turn in own]), np.mean([turn.plain for turn in own])
        error = float(np.std(ratios, ddof=1) / len(own) ** 0.5) if len(own) > 1 else float("nan")
        spread = Quartiles.of(ratios)
        rows.append(
            (
                str(streams),
                str(len(own)),
                f"{drafting:.0f}",
                f"{plain:.0f}",
                f"**{drafting / plain:.3f}**",
                f"{error:.3f}",
                f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]",
                f"{ratios[0]:.3f}",
                f"{sum(turn.same for turn in own)} of {sum(turn.requests for turn in own)}",
            )
        )
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"""# Drafting against plain decoding, by load

`{command}`, {date}. {models} through the gateway, with the default settings (the suffix index off: prompts
are asked several times). A turn makes the same requests with drafts, without, without, with; its ratio is of tokens per
second while all streams have a request open. The budget starts with no knowledge, and what it learns in the first turns
is paid for in them.

{markdown_table(header, rows, text_columns=0)}

{facts}
"""


def _models(up: UpSettings) -> str:
    if up.llm == EMBEDDED_LLM and not up.ssm:
        return "The embedded models"
    folder = resolve_model(up.llm)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cost = ", an inflated model, whose text is a small one's" if INFLATED_FROM in config else ""
    return f"{folder.name}{cost}, with drafts of {', '.join(Path(ssm).name for ssm in up.drafting) or 'look-up'},"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Large model: a folder or a hub id.")] = EMBEDDED_LLM,
    ssm: Annotated[
        list[str] | None, typer.Option(help="Small model that drafts; repeatable. [default: models/default-ssm-1]")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Streams at once; repeatable. [default: 1 2 4 8 16 32]")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns at each load.")] = 6,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="Of the requests.")] = 0.0,
    always: Annotated[bool, typer.Option(help="Draft in every step, whether it pays or not.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The page. [default: drafting-pays-cpu.md or drafting-pays-sampled-cpu.md]")
    ] = None,
) -> None:
    """Compares the default with plain decoding at every load."""
    console = Console(stderr=True)
    machine = describe_machine(0)
    loads = streams or STREAMS
    prompts = [prompt for path in PROMPTS for prompt in read_prompts(path)]
    with exit_on(STACK_FAILURES, console), Progress(console=console) as progress:
        task = progress.add_task("asking the stack", total=len(loads) * turns * len(ORDER))
        options = {**OPTIONS, "verifier": {**OPTIONS["verifier"], "draft_always": always}}
        up = UpSettings(llm=llm, ssm=tuple(ssm or ()))
        measured = measure_turns(
            up, prompts, loads, new_tokens, turns, temperature, options, lambda: progress.advance(task)
        )
        found = asyncio.run(measured)
    text = page(found, _models(up), shown_command("benchmarks.drafting_pays", sys.argv[1:]), machine)
    default = RESULTS / ("drafting-pays-sampled-cpu.md" if temperature else "drafting-pays-cpu.md")
    (out or default).write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
