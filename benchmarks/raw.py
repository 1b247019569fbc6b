"""The raw numbers behind a page, as JSON with one record a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.configurations import HF
from benchmarks.report import Conditions
from benchmarks.rounds import Measurements
from benchmarks.samples import Answer
from benchmarks.summary import Row

MICROSECONDS = 6


def raw_numbers(conditions: Conditions, rows: Sequence[Row], measured: Measurements) -> str:
    """Everything that was measured.

    texts: Hugging Face's output of each prompt. An answer's text is null where it is that one.
    """
    texts = {s.prompt: s.answer.text for s in measured.samples if s.configuration == HF.key}
    samples = [
        dataclasses.asdict(sample) | {"answer": _answer(sample.answer, texts[sample.prompt])}
        for sample in measured.samples
    ]
    latency = [
        dataclasses.asdict(pair)
        | {"gateway": _answer(pair.gateway, texts[pair.prompt]), "direct": _answer(pair.direct, texts[pair.prompt])}
        for pair in measured.latency
    ]
    sections = {
        "conditions": [dataclasses.asdict(conditions)],
        "rows": map(dataclasses.asdict, rows),
        "steps": map(dataclasses.asdict, measured.steps),
        "texts": [texts[prompt] for prompt in sorted(texts)],
        "samples": samples,
        "latency": latency,
    }
    return "{\n" + ",\n".join(f'"{name}": {_lines(records)}' for name, records in sections.items()) + "\n}\n"


def _lines(records: Iterable[object]) -> str:
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]"


def _answer(answer: Answer, reference: str) -> dict[str, Any]:
    return dataclasses.asdict(answer) | {
        "text": None if answer.text == reference else answer.text,
        "first_token_s": round(answer.first_token_s, MICROSECONDS),
        "total_s": round(answer.total_s, MICROSECONDS),
    }
