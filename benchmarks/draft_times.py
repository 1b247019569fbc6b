"""How long a small model's drafts take on a CUDA device, captured in one graph and level by level."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import markdown_table
from runtime.transformer import LoadOptions, Transformer
from services.speculator.drafter import Drafter
from services.speculator.session import DrafterSettings, DraftOrder
from speculation.calibration import Calibration
from speculation.children import ChildSelection
from speculation.sampling import SamplingParams

DEPTH = 8
WARM_UP = 5
# Drafts of a prompt go on for fewer tokens than this, of which each accepts at most two.
PROMPT = 8


@dataclass(frozen=True)
class Drafting:
    """beam: nodes that go on at each level. nodes: of a tree, at most. sequences: that draft at a time."""

    beam: int
    nodes: int
    sequences: int


CASES = (Drafting(2, 11, 1), Drafting(4, 31, 1), Drafting(8, 63, 1), Drafting(4, 31, 8), Drafting(2, 11, 32))


def draft_table(ssm: Path, repeats: int) -> str:
    """A line for each case."""
    model = Transformer.load(ssm, LoadOptions(device="cuda"))
    lines = []
    for case in CASES:
        captured, by_level = (draft_ms(model, case, captured, repeats) for captured in (True, False))
        names = [str(number) for number in (case.sequences, case.beam, case.nodes)]
        lines.append([*names, f"{captured:.2f}", f"{by_level:.2f}"])
    return markdown_table(["sequences", "beam", "nodes", "in one graph, ms", "level by level, ms"], lines)


def draft_ms(model: Transformer, case: Drafting, captured: bool, repeats: int) -> float:
    """The median of so many drafts, behind each of which the first child of the root is accepted."""
    cache = model.new_cache(0.05, case.sequences)
    settings = DrafterSettings(512, case.beam, min_confidence=0.0, stream=1, calibration=Calibration())
    drafter = Drafter("ssm", model, cache, settings, model.capture if captured else None)
    keys = [(1, number) for number in range(case.sequences)]
    for key in keys:
        drafter.open(key, list(range(key[1], key[1] + PROMPT)), PROMPT, SamplingParams(temperature=0))
    orders = [DraftOrder(key, case.nodes, DEPTH, (), ChildSelection.TOP) for key in keys]
    times = [_timed(drafter, orders) for _ in range(WARM_UP + min(repeats, model.config.context_length // 4))]
    return statistics.median(times[WARM_UP:])


def _timed(drafter: Drafter, orders: Sequence[DraftOrder]) -> float:
    started = time.perf_counter()
    trees = drafter.draft(orders)
    taken = 1000 * (time.perf_counter() - started)
    for key, tree in trees.items():
        drafter.advance(key, [tree.token_ids[1]])
    return taken
