"""The `specserve` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from services.common.command_line import settings_command
from services.gateway.api_keys import hash_key, new_key
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
    api_key: Annotated[
        str | None, typer.Option(envvar="SPECSERVE_API_KEY", help="Key for a server that asks for one.")
    ] = None,
) -> None:
    """Completes a prompt through a running gateway; shows the text as it comes, then tokens, LLM steps and speed."""
    options = CompletionOptions(url, model, max_tokens, temperature, seed, timeout_s, api_key)
    raise typer.Exit(run_complete(prompt, options))


@app.command("hash-key")
def hash_api_key(
    new: Annotated[bool, typer.Option("--new", help="Make a key, and show it on stderr, this once.")] = False,
) -> None:
    """Reads an API key from stdin (or makes one, with --new) and prints the line for the gateway's --api-keys-file."""
    key = new_key() if new else sys.stdin.readline().strip()
    try:
        line = hash_key(key)
    except ValueError as error:
        typer.echo(f"error: {error}; `specserve hash-key --new` makes one", err=True)
        raise typer.Exit(2) from None
    if new:
        typer.echo(f"key, which only its user keeps: {key}", err=True)
    typer.echo(line)


if __name__ == "__main__":
    app()
