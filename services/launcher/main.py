"""The `specserve` command."""

from __future__ import annotations

from typing import Annotated

import typer

from services.common.command_line import settings_command
from services.launcher.complete import CompletionOptions
from services.launcher.complete import complete as run_complete
from services.launcher.settings import UpSettings
from services.launcher.up import up
from training.tune import tune

app = typer.Typer(
    help="Token-tree speculative decoding behind OpenAI's HTTP API.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("up")(settings_command(UpSettings, "up", up))
app.command("tune")(tune)


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    url: Annotated[str, typer.Option(help="Where the HTTP API is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of the model; default the server's first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled completion repeatable.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Longest silence of the server, in seconds.")] = 120.0,
) -> None:
    """Completes a prompt through a running gateway; shows the text as it comes, then tokens, LLM steps and speed."""
    options = CompletionOptions(url, model, max_tokens, temperature, seed, timeout_s)
    raise typer.Exit(run_complete(prompt, options))


if __name__ == "__main__":
    app()
