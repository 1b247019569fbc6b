"""`specserve tune`: boost-tune small speculative models (SSMs) on the outputs of an LLM (SpecInfer, section 3).

specserve tune --llm my-llm --ssm-size 2x192 --ssm previous --prompts prompts.jsonl --out tuned
torchrun --nproc-per-node 4 -m training.tune --llm my-llm ...     # on four GPUs, or four processes of a CPU
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

USAGE_ERROR = 2


def tune(
    llm: Annotated[str, typer.Option(help="Language model: a folder or a hub id.")],
    prompts: Annotated[Path, typer.Option(help='JSON Lines of {"prompt": ...}; the LLM continues each of them.')],
    out: Annotated[Path, typer.Option(help="Folder that gets one model folder for each SSM: ssm-1, ssm-2, ...")],
    ssm: Annotated[
        list[str] | None,
        typer.Option(
            help="Small model to start from, with the LLM's tokenizer: a folder or a hub id; 'previous' goes on from "
            "the SSM that was tuned before it. Repeatable."
        ),
    ] = None,
    ssm_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERSxWIDTH", help="Start a new Llama instead, such as 2x192. Repeatable; before those of --ssm."
        ),
    ] = None,
    boost: Annotated[
        bool, typer.Option(help="Each SSM learns what those before it do not cover; without, each learns everything.")
    ] = True,
    segment: Annotated[
        int,
        typer.Option(min=1, help="Tokens that an SSM must guess in a row to cover them: a sample of the boosting."),
    ] = 2,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a continuation.")] = 128,
    samples: Annotated[
        int, typer.Option(min=0, help="Continuations drawn at temperature 1, beside the greedy one, of each prompt.")
    ] = 1,
    continuations: Annotated[
        Path | None, typer.Option(help="Folder of the LLM's continuations. [default: OUT/continuations]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens of each SSM, prompts included.")] = 8_000_000,
    batch: Annotated[int, typer.Option(min=1, help="Continuations of an optimiser step, over all processes.")] = 48,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 2e-3,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each process; 0: all cores.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, draws and order.")] = 0,
) -> None:
    """Tunes one or several small models to draft for a language model, each on what those before it do not cover.

    The LLM continues every prompt, once greedily and --samples times at random; the small models then learn its
    distributions (distillation). What is done is kept in OUT: after a kill the same command goes on to the same result.
    Then draft with them: specserve up --llm LLM --ssm OUT/ssm-1 --ssm OUT/ssm-2
    """
    # Imported here because it takes seconds, and --help does not need it.
    from rich.console import Console

    from runtime.config import UnsupportedModel
    from services.common.model_files import ModelFilesError
    from services.common.prompt_files import BadPrompts
    from training.distributed import joined_group
    from training.files import CannotWrite
    from training.tuning import run
    from training.tuning_inputs import CannotTune, SsmStart, TuneSettings

    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    try:
        starts = [SsmStart.parse(size) for size in ssm_size or []] + [SsmStart.from_model(name) for name in ssm or []]
        settings = TuneSettings(
            llm=llm,
            ssms=tuple(starts),
            prompts=prompts,
            out=out,
            continuations=continuations or out / "continuations",
            boost=boost,
            segment=segment,
            new_tokens=new_tokens,
            samples=samples,
            tokens=tokens,
            batch=batch,
            learning_rate=learning_rate,
            threads=threads,
            seed=seed,
        )
        with joined_group() as group:
            run(settings, group, console)
    except (CannotTune, BadPrompts, ModelFilesError, UnsupportedModel) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE_ERROR) from None
    except CannotWrite as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(tune)
    app(prog_name="python -m training.tune")
