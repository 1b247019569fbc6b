"""What a run has measured, and its raw numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.acceptance.estimates import Ratio
from benchmarks.acceptance.lines import WIDTHS, Line, tree_nodes
from benchmarks.acceptance.success import SuccessRow
from benchmarks.acceptance.tasks import Covered, PromptSet, Walked, WalkKey
from services.common.model_facts import ModelFacts
from speculation.acceptance import AcceptanceRule


@dataclass(frozen=True)
class Conditions:
    """How a run was made. date: ISO. machine: facts by name. models: "llm" first, then the SSMs by source name."""

    command: str
    date: str
    machine: Mapping[str, str]
    models: Mapping[str, ModelFacts]
    new_tokens: int
    seed: int
    beam: int


@dataclass
class Results:
    """Figures by what they are of.

    sets: the prompts and the LLM's texts, by name. lines, rows: in the order of the tables.
    success: Table 1, by prompt set, rule and row: a ratio for each number of candidates.
    tokens_per_step, nodes_per_step: Tables 2 and 3; draft nodes that the LLM checked in a step, on average.
    """

    lines: Sequence[Line]
    rows: Sequence[SuccessRow]
    sets: dict[str, PromptSet] = field(default_factory=dict)
    success: dict[tuple[str, AcceptanceRule, SuccessRow], list[Ratio]] = field(default_factory=dict)
    tokens_per_step: dict[WalkKey, Ratio] = field(default_factory=dict)
    nodes_per_step: dict[WalkKey, float] = field(default_factory=dict)

    def add(self, measured: Walked | Covered) -> None:
        """Take a figure in."""
        if isinstance(measured, Walked):
            decoded = measured.decoded
            self.tokens_per_step[measured.key] = Ratio.of(decoded.tokens, decoded.steps)
            self.nodes_per_step[measured.key] = decoded.draft_nodes / sum(decoded.steps)
            return
        for row, counts in measured.hits.items():
            ratios = [Ratio.of(counts[:, index].tolist(), measured.positions) for index in range(len(WIDTHS))]
            self.success[measured.prompts, measured.rule, row] = ratios

    def positions(self, prompts: str, rule: AcceptanceRule) -> int:
        """Tokens of the text along which a rule is measured."""
        return sum(map(len, self.sets[prompts].texts(rule)))


def raw_numbers(conditions: Conditions, results: Results) -> str:
    """JSON with one record a line; numerators and denominators are by prompt."""
    sections: dict[str, Iterable[Mapping[str, Any]]] = {
        "conditions": [dataclasses.asdict(conditions)],
        "prompts": _prompt_records(results),
        "success": _success_records(results),
        "tokens_per_step": _walk_records(results),
    }
    return "{\n" + ",\n".join(f'"{name}": {_lines(records)}' for name, records in sections.items()) + "\n}\n"


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(record, separators=(",", ":")) for record in records) + "\n]"


def _prompt_records(results: Results) -> Iterator[dict[str, Any]]:
    for name, prompts in results.sets.items():
        yield {
            "set": name,
            "prompt_tokens": list(map(len, prompts.token_ids)),
            "greedy_tokens": list(map(len, prompts.greedy)),
            "sampled_tokens": list(map(len, prompts.sampled)),
        }


def _success_records(results: Results) -> Iterator[dict[str, Any]]:
    for (name, rule, row), ratios in sorted(results.success.items(), key=lambda item: (item[0][0], item[0][1])):
        yield {"set": name, "rule": rule, "sources": row.sources, "each": row.each} | {
            f"k{width}": _figure(ratio) for width, ratio in zip(WIDTHS, ratios, strict=True)
        }


def _walk_records(results: Results) -> Iterator[dict[str, Any]]:
    for key, ratio in sorted(results.tokens_per_step.items(), key=lambda item: dataclasses.astuple(item[0])):
        yield {
            "set": key.prompts,
            "rule": key.rule,
            "line": key.line,
            "nodes": tree_nodes(key.width),
            "nodes_per_step": round(results.nodes_per_step[key], 2),
            **_figure(ratio),
            "tokens": ratio.numerators.astype(int).tolist(),
            "steps": ratio.denominators.astype(int).tolist(),
        }


def _figure(ratio: Ratio) -> dict[str, float]:
    return {"value": round(ratio.value, 4), "error": round(ratio.error, 4)}
