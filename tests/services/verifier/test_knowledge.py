"""What a budget has learned outlives the process, and nothing that happens to its file is an error."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from services.verifier import knowledge
from services.verifier.kept_file import KeptFile
from services.verifier.knowledge import Knowledge
from services.verifier.measured_budget import MeasuredBudget
from speculation.step_curve import StepCurve
from tests.services.harness import services
from tests.services.verifier.simulated_machine import World, memory_bound


def known(folder: Path, **facts: object) -> Knowledge:
    file = KeptFile("drafting", str(folder), {"machine": "this one", **facts})
    return Knowledge(file, World(memory_bound, right=0.8).fresh_budget)


def taught(budget: MeasuredBudget) -> MeasuredBudget:
    """The budget of a world in which drafts are good."""
    world = World(memory_bound, right=0.8)
    world.budget = budget
    world.speedup(1, steps=300)
    return budget


def test_the_next_start_drafts_at_once(tmp_path: Path) -> None:
    first = known(tmp_path)
    taught(first.budget)
    first.write()
    for facts, drafts in (({}, 44), ({"machine": "another"}, 3)):
        world = World(memory_bound, right=0.8)
        world.budget = known(tmp_path, **facts).budget
        world.speedup(1, steps=44)
        assert sum(world.asked) == drafts


def test_written_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge, "EVERY_S", 0.01)
    kept = known(tmp_path)
    path = kept.file.path
    assert path is not None

    async def serve() -> str:
        async with kept.kept():
            await asyncio.sleep(0.1)
            assert not path.exists(), "there is nothing new to write"
            taught(kept.budget)
            for _ in range(500):
                await asyncio.sleep(0.01 * (not path.exists()))
            meanwhile = path.read_text()
            taught(kept.budget)
        return meanwhile

    assert asyncio.run(serve()) != path.read_text()


@pytest.mark.parametrize("damage", ["", "[]", '{"key": 1}', "NaN", "nothing learned", "another form"])
def test_what_cannot_be_used_is_a_warning(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = known(tmp_path)
    taught(first.budget)
    first.write()
    assert first.file.path is not None
    document = json.loads(first.file.path.read_text())
    broken = {
        "NaN": document | {"learned": document["learned"] | {"guards": {"1": [[float("nan")] * 7] * 2}}},
        "nothing learned": {"key": document["key"]},
        "another form": document | {"learned": document["learned"] | {"options": []}},
    }
    first.file.path.write_text(json.dumps(broken[damage]) if damage in broken else damage)
    with caplog.at_level(logging.WARNING):
        assert known(tmp_path).budget.state() == World(memory_bound, right=0.8).budget.state()
    assert "made again" in caplog.text


def test_none_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Knowledge(KeptFile("drafting", "none", {}), lambda: MeasuredBudget(StepCurve({1: 0.02}), 16, 8))
    taught(kept.budget)
    kept.write()
    assert list(tmp_path.iterdir()) == []


def test_a_verifier_writes_what_it_learned_when_it_stops_and_reads_it_when_it_starts(
    llm: Path, ssms: list[Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"draft_always": False, "step_times": str(tmp_path)}

    def learned() -> tuple[Path, dict[str, Any]]:
        with services() as running:
            running.verifier(llm, running.speculator(ssms[0]), **options).generate([5, 9], 60)
        (file,) = tmp_path.glob("drafting-*.json")
        return file, json.loads(file.read_text())

    file, first = learned()
    assert first["key"]["models"] == [ssms[0].name]
    first["learned"]["costs"][0]["measured"] += 1000
    file.write_text(json.dumps(first))
    again, second = learned()
    assert (again, second["key"]) == (file, first["key"])
    assert second["learned"]["costs"][0]["measured"] >= 1000, "it goes on where the first ended"
