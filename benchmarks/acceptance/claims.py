"""Sentences that say from the numbers whether a claim holds, by how much, and where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.acceptance.estimates import Comparison
from benchmarks.acceptance.lines import BOOSTED, INDEPENDENT, MODE_TITLES, MODES, WIDTHS, WITH_LOOKUP, tree_nodes
from benchmarks.acceptance.results import Results
from benchmarks.acceptance.tasks import WalkKey
from speculation.acceptance import AcceptanceRule


@dataclass(frozen=True)
class Where:
    """A cell of a table. column: its heading."""

    prompts: str
    rule: AcceptanceRule
    column: str


def claims(results: Results) -> list[str]:
    """A sentence or two for each claim that the run has figures for."""
    nodes = [f"{tree_nodes(width)} nodes" for width in WIDTHS]
    keys = {line.key for line in results.lines}
    pairs = [
        ("Best-first trees yield more than static trees of as many nodes, SSM 1", "best-first", "static"),
        ("The boosted set yields more than SSM 1 alone, best-first, as many nodes in all", BOOSTED, "best-first"),
        ("The boosted set yields more than the independent one, as many nodes in all", BOOSTED, INDEPENDENT),
        ("Look-up beside the boosted set yields more than the set, as many nodes in all", WITH_LOOKUP, BOOSTED),
    ]
    sentences = [
        f"**{claim}** (Table 2): {verdict(_line_comparisons(results, better, worse, nodes))}"
        for claim, better, worse in pairs
        if {better, worse} <= keys
    ]
    for each, how in ((True, "k candidates of each"), (False, "k candidates in all")):
        if coverage := _set_comparisons(results, each):
            claim = f"The boosted set's {how} cover more than the independent set's"
            sentences.append(f"**{claim}** (Table 1): {verdict(coverage)}")
    return sentences


def verdict(comparisons: Mapping[Where, Comparison]) -> str:
    """In how many cells the ratio is above 1, how large it is, and the cells where it is not."""
    ratios = [comparison.value for comparison in comparisons.values()]
    above = sum(ratio > 1 for ratio in ratios)
    equal = sum(ratio == 1 for ratio in ratios)
    surely_above = sum(comparison.low > 1 for comparison in comparisons.values())
    surely_below = sum(comparison.high < 1 for comparison in comparisons.values())
    holds = "holds everywhere" if above == len(ratios) else "holds nowhere" if above == 0 else "holds in part"
    text = (
        f"{holds}. Of {len(ratios)} cells {above} are above ({surely_above} with the whole 95% interval), {equal} "
        f"equal, {len(ratios) - above - equal} below ({surely_below} with the whole interval); ratio "
        f"{min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}."
    )
    return text if above == len(ratios) else f"{text} Not above: {_exceptions(comparisons)}."


def _exceptions(comparisons: Mapping[Where, Comparison]) -> str:
    grouped: dict[tuple[str, AcceptanceRule], list[tuple[str, float]]] = {}
    for where, comparison in comparisons.items():
        if comparison.value <= 1:
            grouped.setdefault((where.prompts, where.rule), []).append((where.column, comparison.value))
    return "; ".join(
        f"{prompts}, {MODE_TITLES[rule]}: {_cells([column for column, _ in cells])} "
        f"(down to {min(ratio for _, ratio in cells):.2f})"
        for (prompts, rule), cells in grouped.items()
    )


def _cells(columns: Sequence[str]) -> str:
    return "everywhere" if len(columns) == len(WIDTHS) else f"at {', '.join(columns)}"


def _line_comparisons(results: Results, better: str, worse: str, columns: list[str]) -> dict[Where, Comparison]:
    return {
        Where(name, rule, column): results.tokens_per_step[WalkKey(name, rule, better, width)].over(
            results.tokens_per_step[WalkKey(name, rule, worse, width)]
        )
        for name in results.sets
        for rule in MODES
        for width, column in zip(WIDTHS, columns, strict=True)
    }


def _set_comparisons(results: Results, each: bool) -> dict[Where, Comparison]:
    rows = {row.of: row for row in results.rows if len(row.sources) > 1 and row.each is each}
    if not {BOOSTED, INDEPENDENT} <= rows.keys():
        return {}
    return {
        Where(name, rule, f"k = {width}"): ours.over(theirs)
        for name in results.sets
        for rule in MODES
        for width, ours, theirs in zip(
            WIDTHS,
            results.success[name, rule, rows[BOOSTED]],
            results.success[name, rule, rows[INDEPENDENT]],
            strict=True,
        )
    }
