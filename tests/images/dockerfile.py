"""Dockerfiles as lists of instructions, and their instructions carried out on this machine.

No container engine is involved: COPY copies, RUN runs, in folders that stand for the images' own. What belongs to the
operating system of an image, its packages (apt-get) and its user (useradd), is left out: this machine has the former,
and the test's own user stands for the latter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RUN_TIMEOUT_S = 900.0
OF_THE_SYSTEM = ("apt-get", "useradd")
IGNORED = ("__pycache__", "_build", "Dockerfile")


@dataclass(frozen=True)
class Instruction:
    """`COPY a b` is name COPY, text `a b`."""

    name: str
    text: str


def read(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(" ", 1)) for line in joined.splitlines() if line.strip()]


@dataclass
class Stage:
    """What a stage has so far: its environment, and the folders that stand for its own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0"
    command: str = ""

    def here(self, text: str) -> str:
        """A text with the image's paths replaced by those of this machine."""
        # A virtual environment cannot be moved: all stages have theirs at the same place.
        text = re.sub(r"(?<![\w./-])/opt/venv\b", str(self.folder.parent / "venv"), text)
        return re.sub(r"(?<![\w./-])/app\b", str(self.folder), text)

    def expand(self, text: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: self.environment.get(match[1], ""), text)


class Replay:
    """Carries out the stages of a Dockerfile.

    arguments: what `--build-arg` would give. environment: that of this machine, for the programs that RUN starts.
    """

    def __init__(
        self, context: Path, folder: Path, arguments: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        self._context = context
        self._folder = folder
        self._arguments = arguments
        self._outside = environment
        self._stages: dict[str, Stage] = {}

    def run(self, dockerfile: Path) -> Stage:
        """The last stage, carried out."""
        stage: Stage | None = None
        for instruction in read(dockerfile):
            if instruction.name == "FROM":
                stage = self._from(instruction.text)
                continue
            assert stage is not None, f"{dockerfile}: {instruction.name} before FROM"
            self._carry_out(instruction, stage)
        assert stage is not None
        return stage

    def _from(self, text: str) -> Stage:
        image, _, name = text.partition(" AS ")
        name = name or "last"
        stage = Stage(self._folder / name, {"PATH": self._outside["PATH"]})
        if image in self._stages:
            before = self._stages[image]
            shutil.copytree(before.folder, stage.folder)
            stage.environment, stage.user, stage.command = dict(before.environment), before.user, before.command
        stage.folder.mkdir(parents=True, exist_ok=True)
        self._stages[name] = stage
        return stage

    def _carry_out(self, instruction: Instruction, stage: Stage) -> None:
        text = instruction.text
        match instruction.name:
            case "RUN":
                self._run(text, stage)
            case "COPY":
                self._copy(text, stage)
            case "ARG":
                name, _, default = text.partition("=")
                stage.environment[name] = self._arguments.get(name, default)
            case "ENV":
                for pair in text.split():
                    name, _, value = pair.partition("=")
                    stage.environment[name] = stage.here(stage.expand(value))
            case "USER":
                stage.user = text
            case "CMD":
                stage.command = text
            case "WORKDIR":
                assert text == "/app", f"WORKDIR {text}: only /app is known here"
            case "EXPOSE":
                pass
            case unknown:
                raise AssertionError(f"{unknown} is not known here")

    def _run(self, text: str, stage: Stage) -> None:
        if any(program in text for program in OF_THE_SYSTEM):
            return
        done = subprocess.run(
            ["sh", "-c", stage.here(text)],
            cwd=stage.folder,
            env={**self._outside, **stage.environment},
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"RUN {text}: {done.stdout}{done.stderr}"

    def _copy(self, text: str, stage: Stage) -> None:
        *sources, target = text.split()
        root = self._context
        if sources[0].startswith("--from="):
            other = self._stages[sources.pop(0).removeprefix("--from=")]
            if sources == ["/opt/venv"]:
                return  # at the same place already, see Stage.here
            sources = [os.path.relpath(other.here(source), other.folder) for source in sources]
            root = other.folder
        # As .dockerignore has it for what comes from the repository.
        ignored = IGNORED if root == self._context else ()
        destination = stage.folder / target
        for source in sources:
            found = sorted(root.glob(source))
            assert found, f"COPY {text}: there is no {source}"
            for path in found:
                _copy(path, destination / path.name if target.endswith("/") else destination, ignored)


def _copy(path: Path, target: Path, ignored: Sequence[str]) -> None:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignored))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
