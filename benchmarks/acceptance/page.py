"""The result page: tables, claims, how they were measured, on what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.acceptance import methods, paper
from benchmarks.acceptance.against_paper import over_naive, paper_rows, summary
from benchmarks.acceptance.claims import claims
from benchmarks.acceptance.estimates import Comparison, Ratio
from benchmarks.acceptance.lines import BOOSTED, MODE_TITLES, MODES, WIDTHS, tree_nodes
from benchmarks.acceptance.results import Conditions, Results
from benchmarks.acceptance.success import SuccessRow
from benchmarks.acceptance.tasks import WalkKey
from benchmarks.markdown import markdown_table
from speculation.acceptance import AcceptanceRule


def acceptance_page(results: Results, conditions: Conditions, chart: str) -> str:
    """The whole page in Markdown. chart: file name of the picture beside the page."""
    sections = [
        "# Acceptance",
        methods.introduction(conditions),
        "## What the figures say",
        _bullets(claims(results)),
        f"![Tokens per LLM step by width of the tree]({chart})",
        "## Table 1: success of k candidates",
        methods.SUCCESS,
        *(_success_table(results, rule) for rule in MODES),
        "## Table 2: tokens per LLM step by size of the tree",
        methods.walks(conditions),
        *(_walk_table(results, rule) for rule in MODES),
        "## Table 3: sampling rules on the same trees",
        methods.NAIVE,
        _naive_table(results),
        "## Against the paper",
        methods.PAPER,
        _bullets(summary(paper_rows(results))),
        _paper_table(results),
        "## How it was measured",
        methods.method(results, conditions),
        _prompt_table(results),
        "## Models and machine",
        _bullets([*_models(conditions), *(f"{name}: {fact}" for name, fact in conditions.machine.items())]),
    ]
    return "\n\n".join(sections) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _success_table(results: Results, rule: AcceptanceRule) -> str:
    cells = [
        [name, _row_title(row), *(_percent(ratio) for ratio in results.success[name, rule, row])]
        for name in results.sets
        for row in results.rows
    ]
    span = paper.success(rule)
    theirs = [f"{span[width].low:.0%} .. {span[width].high:.0%}" if width in span else "" for width in WIDTHS]
    cells.append(["paper", "SSM 1", *theirs])
    header = [MODE_TITLES[rule], "candidates", *(f"k = {width}" for width in WIDTHS)]
    return markdown_table(header, cells, text_columns=2)


def _row_title(row: SuccessRow) -> str:
    if len(row.sources) > 1:
        return f"{len(row.sources)} {row.of} SSMs, k {'of each' if row.each else 'in all'}"
    number = row.sources[0].rpartition("-")[2]
    return f"SSM {number}" if row.of == BOOSTED else f"{row.of} SSM {number}"


def _percent(ratio: Ratio) -> str:
    return f"{100 * ratio.value:.1f} ± {100 * ratio.error:.1f}"


def _walk_table(results: Results, rule: AcceptanceRule) -> str:
    cells = [
        [name, line.title, *(_tokens(results.tokens_per_step[WalkKey(name, rule, line.key, w)]) for w in WIDTHS)]
        for name in results.sets
        for line in results.lines
    ]
    spans = paper.tokens_per_step(rule)
    cells.append(["paper", "SSM 1 static", *(f"{span.low:.2f} .. {span.high:.2f}" for span in spans)])
    header = [MODE_TITLES[rule], "drafts", *(f"{tree_nodes(width)} nodes" for width in WIDTHS)]
    return markdown_table(header, cells, text_columns=2)


def _tokens(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ± {ratio.error:.2f}"


def _naive_table(results: Results) -> str:
    cells = []
    for name in results.sets:
        for line in results.lines[:2]:
            row = [name, line.title]
            for rule in (AcceptanceRule.NAIVE, AcceptanceRule.MSS, AcceptanceRule.SHARED_NOISE):
                figure = _tokens(results.tokens_per_step[WalkKey(name, rule, line.key, max(WIDTHS))])
                ratio = (
                    "" if rule is AcceptanceRule.NAIVE else f" ({_times(over_naive(results, name, line.key, rule))})"
                )
                row.append(figure + ratio)
            cells.append(row)
    return markdown_table(["tokens per LLM step", "drafts", "naive", "MSS", "shared noise"], cells, text_columns=2)


def _times(comparison: Comparison) -> str:
    return f"{comparison.value:.2f}× [{comparison.low:.2f}, {comparison.high:.2f}]"


def _paper_table(results: Results) -> str:
    rows = paper_rows(results)
    cells = [
        [row.of, row.what, row.theirs, *(f"**{c.text}**" if c.above else c.text for c in row.ours.values())]
        for row in rows
    ]
    return markdown_table(["bold: above the paper's highest", "ours", "paper", *results.sets], cells, text_columns=2)


def _prompt_table(results: Results) -> str:
    cells = [
        [
            name,
            str(len(prompts.token_ids)),
            str(sum(map(len, prompts.token_ids))),
            str(results.positions(name, AcceptanceRule.GREEDY)),
            str(results.positions(name, AcceptanceRule.SHARED_NOISE)),
        ]
        for name, prompts in results.sets.items()
    ]
    return markdown_table(["prompt set", "prompts", "their tokens", "greedy positions", "sampled positions"], cells)


def _models(conditions: Conditions) -> Iterator[str]:
    for name, facts in conditions.models.items():
        title = "LLM" if name == "llm" else name.replace("-", " SSM ")
        yield (
            f"{title}: {facts.model}, {facts.parameters / 1e6:.1f}M parameters, stored as {facts.dtype}, "
            f"{facts.kernels} kernels on {facts.device}"
        )
