"""Files that are whole or not there: what survives a kill at any moment."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch


class CannotWrite(Exception):
    """A file that could not be written; the message is one line that says what to do."""


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CannotWrite(
        f"{path}: cannot be written: {reason}; make room, then repeat the command: it goes on from there"
    )


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its old version, and put it in that one's place once it is on the disk.

    Raises:
        CannotWrite: no space is left, or the folder cannot be written to.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def write_json(path: Path, value: object) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_state(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint that `torch.load(weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())
