"""The picture beside the page: tokens per LLM step by size of the tree."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.acceptance import paper
from benchmarks.acceptance.lines import MODE_TITLES, MODES, WIDTHS, tree_nodes
from benchmarks.acceptance.results import Results
from benchmarks.acceptance.tasks import WalkKey
from speculation.acceptance import AcceptanceRule

# Colours that differ in lightness too (Okabe and Ito), and markers, by place among the lines.
STYLES = (("#7f7f7f", "s"), ("#0072b2", "o"), ("#d55e00", "^"), ("#56b4e9", "v"), ("#009e73", "D"), ("#cc79a7", "P"))
BAND = "#e2e2e2"


def draw_plot(results: Results, path: Path) -> None:
    """A panel for each prompt set and mode; the same results give the same bytes."""
    names = list(results.sets)
    # Text stays text: the file is small, and diffs can be read.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "specserve", "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 2.5 * len(names) + 0.9), layout="constrained")
        panels = figure.subplots(len(names), len(MODES), sharex=True, sharey=True, squeeze=False)
        for row, name in enumerate(names):
            for column, rule in enumerate(MODES):
                axes = panels[row, column]
                _draw_panel(axes, results, name, rule)
                axes.set_title(f"{name}, {MODE_TITLES[rule]}", fontsize=9)
                axes.tick_params(labelsize=8)
            panels[row, 0].set_ylabel("tokens per LLM step", fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("draft nodes (the paper's widths 1 to 5)", fontsize=8)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
        figure.savefig(path, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(axes: Axes, results: Results, name: str, rule: AcceptanceRule) -> None:
    nodes = [tree_nodes(width) for width in WIDTHS]
    spans = paper.tokens_per_step(rule)
    low, high = [span.low for span in spans], [span.high for span in spans]
    axes.fill_between(nodes, low, high, color=BAND, linewidth=0, label="the paper's five sets, static")
    for line, (color, marker) in zip(results.lines, STYLES, strict=False):
        values = [results.tokens_per_step[WalkKey(name, rule, line.key, width)].value for width in WIDTHS]
        axes.plot(nodes, values, color=color, marker=marker, markersize=4, linewidth=1.4, label=line.title)
    axes.set_xticks(nodes)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
