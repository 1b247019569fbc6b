"""The command line of a settings class: one typer command, generated from the fields."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from services.common.setting_values import choices, element_type, strip_optional, to_text
from services.common.settings import Field, SettingsError, fields_of, load_settings, variable

S = TypeVar("S")

USAGE_ERROR = 2


def settings_command(cls: type[S], section: str, run: Callable[[S, Path | None], int]) -> Callable[..., None]:
    """A function that typer can register: parses the flags of `cls`, loads its settings, calls `run`.

    `run` gets the settings and the --config file, if one was given, and returns the exit code.
    """

    def command(config: Path | None, **flags: object) -> None:
        try:
            settings = load_settings(cls, section, flags=flags, config=config)
        except SettingsError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USAGE_ERROR) from None
        raise typer.Exit(run(settings, config))

    example = next(field for field in fields_of(cls))
    command.__doc__ = (
        f"{inspect.getdoc(cls)}\n\n"
        f"Every flag is also an environment variable ({example.flag}: {variable(section, example.name)}) and a key of "
        f"[{section}] in the TOML file given by --config ({example.name}); a flag wins over the environment, the "
        "environment over the file."
    )
    parameters = [_config_parameter(), *(_parameter(field) for field in fields_of(cls))]
    # typer reads the signature for the order and the annotations for the types.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions accept any attribute
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def run_command(
    cls: type[S], section: str, run: Callable[[S, Path | None], int], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Runs the only command of a program, on sys.argv unless `arguments` are given; exits the process."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(settings_command(cls, section, run))
    app(args=None if arguments is None else list(arguments), prog_name=f"python -m services.{section}")
    raise AssertionError("typer exits the process")


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", help="TOML file with the settings of all services.", metavar="FILE")
    return _keyword("config", Annotated[Path | None, option])


def _parameter(field: Field) -> inspect.Parameter:
    base, _ = strip_optional(field.annotation)
    declaration = f"{field.flag}/--no-{field.flag[2:]}" if base is bool else field.flag
    option = typer.Option(declaration, help=_help(field), metavar=_metavar(field), show_default=False)
    if base is bool:
        return _keyword(field.name, Annotated[bool | None, option])
    if element_type(field.annotation) is not None:
        return _keyword(field.name, Annotated[list[str] | None, option])
    return _keyword(field.name, Annotated[str | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: Field) -> str:
    notes = [] if not field.bounds() else [field.bounds()]
    if field.default is dataclasses.MISSING:
        notes.append("required")
    elif field.default not in (None, ()):
        defaults = field.default if isinstance(field.default, tuple) else (field.default,)
        notes.append(f"default {' '.join(to_text(value) for value in defaults)}")
    return f"{field.help_text} [{'; '.join(notes)}]" if notes else field.help_text


def _metavar(field: Field) -> str | None:
    base = element_type(field.annotation) or strip_optional(field.annotation)[0]
    if options := choices(base):
        return "|".join(str(option) for option in options)
    if base is bool:
        return None
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(base, "TEXT") if isinstance(base, type) else "TEXT"
