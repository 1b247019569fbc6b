"""The raw numbers behind a page, as JSON with one record a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.configurations import PLAIN
from benchmarks.gateway import GatewayLoad
from benchmarks.report import Conditions
from benchmarks.samples import Answer
from benchmarks.target import Target

MICROSECONDS = 6


def raw_numbers(conditions: Conditions, targets: Sequence[Target], gateway: Sequence[GatewayLoad]) -> str:
    """Everything that was measured; each record of a target names it.

    texts: our plain output of each prompt. An answer's text is null where it is that one.
    """
    sections: dict[str, list[object]] = {
        "conditions": [dataclasses.asdict(conditions)],
        "gateway": [dataclasses.asdict(load) for load in gateway],
    }
    for target in targets:
        for name, records in _records(target).items():
            sections.setdefault(name, []).extend({"target": target.name} | record for record in records)
    return "{\n" + ",\n".join(f'"{name}": {_lines(records)}' for name, records in sections.items()) + "\n}\n"


def _records(target: Target) -> dict[str, list[dict[str, Any]]]:
    measured = target.measured
    texts = {s.prompt: s.answer.text for s in measured.samples if s.configuration == PLAIN.key}

    def shorten(record: dict[str, Any], answers: dict[str, Answer], prompt: int) -> dict[str, Any]:
        return record | {name: _answer(answer, texts[prompt]) for name, answer in answers.items()}

    return {
        "rows": [dataclasses.asdict(row) for row in target.rows],
        "aims": [dataclasses.asdict(aim) | {"met": aim.met} for aim in target.aims],
        "steps": [dataclasses.asdict(step) for step in measured.steps],
        "peer_steps": [dataclasses.asdict(step) for step in measured.peer_steps],
        "trials": [dataclasses.asdict(trial) for trial in measured.trials],
        "load": [_load(dataclasses.asdict(sample)) for sample in measured.load],
        "texts": [{"prompt": prompt, "text": texts[prompt]} for prompt in sorted(texts)],
        "samples": [shorten(dataclasses.asdict(s), {"answer": s.answer}, s.prompt) for s in measured.samples],
        "latency": [
            shorten(dataclasses.asdict(pair), {"gateway": pair.gateway, "direct": pair.direct}, pair.prompt)
            for pair in measured.latency
        ],
    }


def _lines(records: Iterable[object]) -> str:
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]"


def _load(record: dict[str, Any]) -> dict[str, Any]:
    """Thousands of times: two decimals of a millisecond, and only their distribution for the gaps."""
    gaps = sorted(record["gap_ms"])
    picked = [gaps[len(gaps) * percent // 100] for percent in range(0, 100, 5)] + gaps[-1:] if gaps else []
    return record | {
        "first_token_ms": [round(ms, 2) for ms in record["first_token_ms"]],
        "gap_ms": [round(ms, 2) for ms in picked],
    }


def _answer(answer: Answer, reference: str) -> dict[str, Any]:
    return dataclasses.asdict(answer) | {
        "text": None if answer.text == reference else answer.text,
        "first_token_s": round(answer.first_token_s, MICROSECONDS),
        "total_s": round(answer.total_s, MICROSECONDS),
    }
