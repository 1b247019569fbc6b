"""The picture beside the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.summary import Row

OURS, THEIRS = "#2b6cb0", "#a0aec0"


def draw_chart(targets: Mapping[str, Sequence[Row]], path: Path) -> None:
    """For each target bars of milliseconds per token, with quartiles, and of tokens per LLM step.

    The same rows give the same bytes.
    """
    heights = [len(rows) + 1 for rows in targets.values()]
    # Text stays text: the file is small, and diffs can be read.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "specserve", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 0.42 * sum(heights) + 1.0), layout="constrained")
        grid = figure.subplots(len(targets), 2, sharey="row", squeeze=False, height_ratios=heights)
        for (left, right), (name, rows) in zip(grid, targets.items(), strict=True):
            _draw_bars(left, right, name, rows)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_bars(left: Axes, right: Axes, name: str, rows: Sequence[Row]) -> None:
    labels = [row.configuration.key for row in rows]
    colors = [OURS if row.configuration.engine == "specserve" else THEIRS for row in rows]
    times = [row.ms_per_token for row in rows]
    spread = [[t.median - t.low for t in times], [t.high - t.median for t in times]]
    bars = left.barh(labels, [t.median for t in times], xerr=spread, color=colors, ecolor="#4a5568", capsize=2)
    left.bar_label(bars, fmt="%.2f", padding=6, fontsize=8)
    left.set_title(f"{name}: ms per token (median, quartiles)", fontsize=9)
    left.invert_yaxis()
    bars = right.barh(labels, [row.tokens_per_step for row in rows], color=colors)
    right.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    right.set_title("tokens per LLM step", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
