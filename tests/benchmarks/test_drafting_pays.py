"""With drafts and without, in turns, through the whole stack."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.drafting_pays import ORDER, Turn, measure_turns, page
from services.launcher.settings import UpSettings
from tests.tiny_models import write_model


def test_turns_ask_the_same_with_drafts_and_without(tmp_path: Path) -> None:
    llm, ssm = (str(write_model(tmp_path / name)) for name in ("llm", "ssm"))
    arms: list[None] = []
    turns = asyncio.run(
        measure_turns(
            UpSettings(llm=llm, ssm=(ssm,)),
            ["one two", "three"],
            streams=(1, 3),
            new_tokens=8,
            turns=2,
            temperature=1.0,
            on_arm=lambda: arms.append(None),
        )
    )
    assert [turn.streams for turn in turns] == [1, 1, 3, 3]
    assert len(arms) == len(turns) * len(ORDER)
    for turn in turns:
        assert turn.same == turn.requests
        assert turn.drafting > 0
        assert turn.plain > 0


def test_the_page_shows_ratios_and_different_texts() -> None:
    turns = [Turn(8, 120.0, 100.0, 32, 32), Turn(8, 90.0, 100.0, 32, 31)]
    text = page(turns, "The models", "python -m benchmarks.drafting_pays", {"CPU": "two cores"})
    (row,) = [line for line in text.splitlines() if line.startswith("| 8 |")]
    assert "| **1.050** |" in row
    assert "| 1.200 |" in row
    assert row.endswith("| 63 of 64 |")
    assert "The models through the gateway" in text
    assert "two cores" in text
