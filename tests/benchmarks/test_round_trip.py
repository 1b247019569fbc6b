"""What a step waits for its drafts, by the clocks of real services."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.round_trip import RoundTrips, measure_round_trips, page
from services.launcher.settings import UpSettings
from tests.tiny_models import write_model


def test_steps_wait_and_the_speculator_works_meanwhile(tmp_path: Path) -> None:
    llm, ssm = (str(write_model(tmp_path / name)) for name in ("llm", "ssm"))
    up = UpSettings(llm=llm, ssm=(ssm,))
    rows = asyncio.run(measure_round_trips(up, ["one two", "three"], (1, 3), new_tokens=12, turns=2))
    assert [row.streams for row in rows] == [1, 3]
    for row in rows:
        assert row.orders > 0
        assert 0 < row.worked_ms < row.answer_ms
        assert row.settled_ms > 0
        assert row.median_ms > 0
        assert row.apart_ms > 0 < row.inside_ms


def test_the_page_shows_what_is_added() -> None:
    text = page(
        [RoundTrips(8, 120, 2.5, 0.5, 0.75, 0.25, 9.5, 8.75)], "python -m benchmarks.round_trip", {"CPU": "two cores"}
    )
    assert "| 8 | 120 | 2.50 | 1.75 | 0.50 | 0.75 | 0.25 | 9.50 | 8.75 | 0.75 |" in text
    assert "two cores" in text
