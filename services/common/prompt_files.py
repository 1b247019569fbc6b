"""Prompts as JSON Lines: what benchmarks answer and small models are tuned on."""

from __future__ import annotations

import json
from pathlib import Path


class BadPrompts(Exception):
    """A prompts file that cannot be used; the message is one line for the user."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a JSON Lines file of {"prompt": ...}; other keys are ignored.

    Raises:
        BadPrompts: the file is missing or no text, a line is something else, or there is none.
    """
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise BadPrompts(f"{path}: {error.strerror}; give a JSON Lines file of prompts") from None
    except UnicodeDecodeError as error:
        raise BadPrompts(f"{path}: not UTF-8 at byte {error.start}; give a JSON Lines file of prompts") from None
    prompts = []
    # Not splitlines: a text may hold what Unicode calls a line separator.
    for number, line in enumerate(text.split("\n") if text else [], start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise BadPrompts(f'{path}, line {number}: got {line[:60]!r}; each line must be {{"prompt": "some text"}}')
        prompts.append(prompt)
    if not prompts:
        raise BadPrompts(f'{path} holds no prompts; write one {{"prompt": ...}} a line')
    return tuple(prompts)
