"""Our figures beside the paper's: where they are above the highest of its five sets of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.acceptance import paper
from benchmarks.acceptance.estimates import Comparison
from benchmarks.acceptance.lines import INDEPENDENT, MODE_TITLES, MODES, WIDTHS
from benchmarks.acceptance.results import Results
from benchmarks.acceptance.tasks import WalkKey
from speculation.acceptance import AcceptanceRule


@dataclass(frozen=True)
class Cell:
    """text: our figures. above: whether all of them are above the paper's highest."""

    text: str
    above: bool


@dataclass(frozen=True)
class PaperRow:
    """of: which table and mode. what: which of our drafts. theirs: the paper's range. ours: by prompt set."""

    of: str
    what: str
    theirs: str
    ours: Mapping[str, Cell]


def paper_rows(results: Results) -> list[PaperRow]:
    """Every comparison that the paper's figures allow."""
    return [*_success_rows(results), *_tokens_rows(results), *_naive_rows(results)]


def summary(rows: list[PaperRow]) -> list[str]:
    """For each table and mode the sets of prompts on which some drafts of ours are above the paper's highest figure."""
    sentences = []
    for of in dict.fromkeys(row.of for row in rows):
        own = [row for row in rows if row.of == of]
        reached = {
            name: [row.what for row in own if row.ours[name].above]
            for name in own[0].ours
            if any(row.ours[name].above for row in own)
        }
        missed = [name for name in own[0].ours if name not in reached]
        where = "; ".join(f"{name} ({', '.join(drafts)})" for name, drafts in reached.items())
        text = f"above the paper's highest on {where}" if reached else "nowhere above the paper's highest"
        rest = f"; not on {', '.join(missed)}" if reached and missed else ""
        sentences.append(f"**{of}**: {text}{rest}.")
    return sentences


def over_naive(results: Results, prompts: str, line: str, rule: AcceptanceRule) -> Comparison:
    """Tokens per LLM step of a rule over those of naive sampling, for the widest trees."""
    ours, naive = (WalkKey(prompts, each, line, max(WIDTHS)) for each in (rule, AcceptanceRule.NAIVE))
    return results.tokens_per_step[ours].over(results.tokens_per_step[naive])


def _success_rows(results: Results) -> Iterator[PaperRow]:
    compared = [row for row in results.rows if not row.each and row.of == results.rows[0].of]
    compared = [compared[0], *(row for row in compared[1:] if len(row.sources) > 1)]
    for rule in MODES:
        for k, span in paper.success(rule).items():
            for row in compared:
                rates = {name: results.success[name, rule, row][WIDTHS.index(k)].value for name in results.sets}
                ours = {name: Cell(f"{rate:.1%}", rate > span.high) for name, rate in rates.items()}
                what = "SSM 1" if len(row.sources) == 1 else f"{len(row.sources)} boosted SSMs"
                yield PaperRow(
                    f"Table 1, {MODE_TITLES[rule]}, k = {k}", what, f"{span.low:.0%} .. {span.high:.0%}", ours
                )


def _tokens_rows(results: Results) -> Iterator[PaperRow]:
    for rule in MODES:
        spans = paper.tokens_per_step(rule)
        for line in (line for line in results.lines if line.key != INDEPENDENT):
            ours = {}
            for name in results.sets:
                keys = [WalkKey(name, rule, line.key, width) for width in WIDTHS]
                figures = [results.tokens_per_step[key].value for key in keys]
                above = all(figure > span.high for figure, span in zip(figures, spans, strict=True))
                ours[name] = Cell(f"{figures[0]:.2f} .. {figures[-1]:.2f}", above)
            theirs = f"{spans[0].high:.2f} .. {spans[-1].high:.2f}"
            yield PaperRow(f"Table 2, {MODE_TITLES[rule]}, at every width", line.title, theirs, ours)


def _naive_rows(results: Results) -> Iterator[PaperRow]:
    span = paper.MSS_OVER_NAIVE
    for line in results.lines[:2]:
        ratios = {name: over_naive(results, name, line.key, AcceptanceRule.MSS).value for name in results.sets}
        ours = {name: Cell(f"{ratio:.2f}", ratio > span.high) for name, ratio in ratios.items()}
        yield PaperRow("Table 3, MSS over naive", line.title, f"{span.low:.2f} .. {span.high:.2f}", ours)
