"""What pages of results are written with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.summary import Quartiles


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """The first columns are text, the others are numbers."""
    align = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def with_quartiles(value: Quartiles, digits: int = 2) -> str:
    """median [low, high]"""
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """The command as a page shows it: folders outside of the project by their last name alone."""
    shown = []
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        shown.append(flag + equals + (Path(value).name if value.startswith("/") else value))
    return shlex.join(["python", "-m", module, *shown])
