"""Measures how long a step takes by its rows, and remembers it for each model and machine."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kernels.build import shared_library_path
from kernels.native import get_num_threads, native_available
from kernels.targets import cpu_identity
from runtime.step_model import StepModel
from services.common.loaded_model import LoadedModel
from services.verifier.kept_file import KeptFile
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


class StepTimes:
    """The step times of a loaded model. Takes them from a file, or measures and writes them.

    folder: see KeptFile. ranks: tensor and pipeline parallel.
    """

    def __init__(self, folder: str, loaded: LoadedModel[StepModel], ranks: tuple[int, int] = (1, 1)) -> None:
        self.facts = {**model_facts(loaded.model), **machine_facts(loaded.model.device), "ranks": list(ranks)}
        self.file = KeptFile("step-times", folder, self.facts)

    def points(self, runner: Runner, most_rows: int) -> Mapping[int, float]:
        """Seconds by rows, at least of one row. A file that is damaged or of another model or machine is not used."""
        if (kept := self.file.read(_points)) is not None:
            log.info("step times known", extra={"file": str(self.file.path), "ms": _shown(kept)})
            return kept
        step = step_of(runner, most_rows)
        if runner.model.device.type == "cuda":
            for rows in row_counts(most_rows):  # the first step of a shape captures it
                step(rows)
        points = measure(step, most_rows, SECONDS)
        log.info("step times measured", extra={"ms": _shown(points)})
        self.file.write({"seconds": points})
        return points


def _points(document: Mapping[str, Any]) -> dict[int, float]:
    points = {int(rows): float(seconds) for rows, seconds in document["seconds"].items()}
    if 1 not in points or not all(0 < seconds < float("inf") for seconds in points.values()):
        raise ValueError("it has no positive time of one row, or others that are not positive")
    return points


def measure(
    step: Callable[[int], None], most_rows: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Median seconds by rows, of what fits into the time; of one row always. The row counts take turns."""
    counts = row_counts(most_rows)
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


def row_counts(most_rows: int) -> list[int]:
    """Those that are measured, what matters most first."""
    return [rows for rows in ROWS if rows <= min(most_rows, MAX_NODES)]


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
        "kernels": shared_library_path().name if model.backend.name == "native" else model.backend.name,
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
