"""Small documents that a verifier keeps over restarts, each of one model on one machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

NONE = "none"


class KeptFile:
    """A JSON document that is of use under the facts it was written under, and no others.

    Nothing that happens to it is an error: what cannot be read is made again, what cannot be written is lost.

    kind: begins its name. folder: of the file; empty for the user's cache folder, NONE for no file.
    """

    def __init__(self, kind: str, folder: str, facts: Mapping[str, object]) -> None:
        self._facts = json.loads(json.dumps(facts))
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        root = Path(folder) if folder else cache_folder()
        self.path = None if folder == NONE else root / f"{kind}-{digest[:16]}.json"

    def read(self, parse: Callable[[dict[str, Any]], T]) -> T | None:
        """What `parse` makes of the content; None when there is none or it is damaged, with a warning."""
        if self.path is None:
            return None
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"), parse_constant=_refuse)
            if document["key"] != self._facts:
                raise ValueError("it is of another model or machine")
            return parse(document)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("kept file not used, made again", extra={"file": str(self.path), "reason": repr(error)})
            return None

    def write(self, content: Mapping[str, Any]) -> None:
        """Whole or not at all, so that services that start together read what one of them wrote."""
        if self.path is None:
            return
        try:
            document = json.dumps({"key": self._facts, **content}, indent=1, allow_nan=False)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                file.write(document)
            os.replace(file.name, self.path)
        except (OSError, ValueError) as error:
            log.warning("file cannot be kept; set step_times", extra={"file": str(self.path), "reason": str(error)})


def cache_folder() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specserve"


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} among its numbers")
