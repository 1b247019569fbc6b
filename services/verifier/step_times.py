"""Measures how long a step takes by its rows, and remembers it for each model and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kernels.build import library_path
from kernels.native import get_num_threads, native_available
from kernels.targets import cpu_identity
from runtime.step_model import StepModel
from services.common.loaded_model import LoadedModel
from services.verifier.request import GenerationRequest
from services.verifier.runner import Runner
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence
from speculation.logits import LogitsPipeline
from speculation.merge import MergedDraft
from speculation.sampling import SamplingParams
from speculation.tree import MAX_NODES, TokenTree

log = logging.getLogger(__name__)

VERSION = 1
# What matters most first: the time may be over before the last.
ROWS = (1, 8, 4, 16, 2, 32, 64, 6, 3, 12, 24, 128, 48, 96, 256)
REPEATS = 5
# Longest time that the measuring takes, but for the steps under way when it is over.
SECONDS = 1.5
CONTEXT = 64
NONE = "none"


class StepTimes:
    """The step times of a loaded model. Takes them from a file, or measures and writes them.

    folder: of the file; empty for the user's cache folder, NONE for no file. ranks: tensor and pipeline parallel.
    """

    def __init__(self, folder: str, loaded: LoadedModel[StepModel], ranks: tuple[int, int] = (1, 1)) -> None:
        self._key = {**model_facts(loaded.model), **machine_facts(loaded.model.device), "ranks": list(ranks)}
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        root = Path(folder) if folder else cache_folder()
        self.path = None if folder == NONE else root / f"step-times-{digest[:16]}.json"

    def points(self, runner: Runner, most_rows: int) -> Mapping[int, float]:
        """Seconds by rows, at least of one row. A file that is damaged or of another model or machine is not used."""
        if (kept := self._read()) is not None:
            log.info("step times known", extra={"file": str(self.path), "ms": _shown(kept)})
            return kept
        points = measure(step_of(runner, most_rows), most_rows, SECONDS)
        log.info("step times measured", extra={"ms": _shown(points)})
        self._write(points)
        return points

    def _read(self) -> dict[int, float] | None:
        if self.path is None:
            return None
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["key"] != self._key:
                raise ValueError("it is of another model or machine")
            points = {int(rows): float(seconds) for rows, seconds in document["seconds"].items()}
            if 1 not in points or not all(0 < seconds < float("inf") for seconds in points.values()):
                raise ValueError("it has no positive time of one row, or others that are not positive")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("step times measured again", extra={"file": str(self.path), "reason": repr(error)})
            return None
        return points

    def _write(self, points: Mapping[int, float]) -> None:
        """Whole or not at all, so that services that start together read what one of them wrote."""
        if self.path is None:
            return
        document = json.dumps({"key": self._key, "seconds": points}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                file.write(document)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning(
                "step times cannot be kept; set step_times", extra={"file": str(self.path), "reason": str(error)}
            )


def measure(
    step: Callable[[int], None], most_rows: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Median seconds by rows, of what fits into the time; of one row always. The row counts take turns."""
    counts = [rows for rows in ROWS if rows <= min(most_rows, MAX_NODES)]
    times: dict[int, list[float]] = {rows: [] for rows in counts}
    until = clock() + seconds
    step(1)  # warms up
    for _ in range(REPEATS):
        for rows in counts:
            if times[1] and clock() >= until:
                break
            started = clock()
            step(rows)
            times[rows].append(clock() - started)
    return {rows: statistics.median(values) for rows, values in sorted(times.items()) if values}


def step_of(runner: Runner, most_rows: int) -> Callable[[int], None]:
    """A step over a tree of so many nodes, with the logits and the choice of every node, behind a short context."""
    config, device = runner.model.config, runner.model.device
    context = min(CONTEXT, config.context_length - 1)
    tokens = tuple(number % config.vocab_size for number in range(max(context + 1, most_rows)))
    params = SamplingParams(temperature=0)
    request = GenerationRequest("step times", tokens[: context + 1], params, 1)
    pipeline = LogitsPipeline(params, request.prompt, config.vocab_size, device)
    sequence = Sequence(0, request, lambda _output: None, pipeline)

    def step(rows: int) -> None:
        binary_tree = TokenTree(tokens[:rows], (-1, *((node - 1) // 2 for node in range(1, rows))))
        runner.cache.reserve(sequence.cache, context + rows)
        sequence.cache.length = context  # whatever stands in these entries takes as long
        try:
            plan = SequencePlan(sequence, context, True, rows - 1, rows)
            runner.forward([plan], {0: MergedDraft.single(binary_tree)}).trees.argmax(-1).tolist()
        finally:
            runner.cache.release(sequence.cache)

    return step


def model_facts(model: StepModel) -> dict[str, object]:
    """What the time of a step depends on, of the model."""
    return {
        "version": VERSION,
        "config": dataclasses.asdict(model.config) | {"eos_token_ids": None},
        "weights": str(model.weight_dtype),
        "kernels": library_path().name if model.backend.name == "native" else model.backend.name,
        "torch": torch.__version__,
    }


def machine_facts(device: torch.device) -> dict[str, object]:
    """What it depends on, of the machine."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        "device": cpu_identity(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": get_num_threads() if native_available() else torch.get_num_threads(),
    }


def _shown(points: Mapping[int, float]) -> dict[int, float]:
    return {rows: round(1000 * seconds, 2) for rows, seconds in points.items()}


def cache_folder() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specserve"
