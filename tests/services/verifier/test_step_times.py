"""Measured once for each model and machine, within a bounded time, and again when what was kept cannot be used."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.step_model import StepModel
from runtime.transformer import LoadOptions, Transformer
from services.common.loaded_model import LoadedModel
from services.verifier.kept_file import cache_folder
from services.verifier.runner import Runner
from services.verifier.step_times import StepTimes, measure
from tests.services.harness import Services


class Clock:
    """Time passes only when a step is taken: `costs` seconds by rows."""

    def __init__(self, costs: float) -> None:
        self.now, self.costs, self.taken = 0.0, costs, list[int]()

    def __call__(self) -> float:
        return self.now

    def step(self, rows: int) -> None:
        self.taken.append(rows)
        self.now += self.costs * (1 + rows / 64)


@pytest.fixture(scope="module")
def loaded(llm: Path) -> LoadedModel[StepModel]:
    def load(folder: Path) -> StepModel:
        return Transformer.load(folder, LoadOptions(device="cpu"))

    return LoadedModel.load(str(llm), load, kv_memory=0.01, max_sequences=4)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="services.verifier.kept_file"):
        yield caplog


def test_a_fast_model_is_measured_at_all_rows() -> None:
    clock = Clock(1e-4)
    points = measure(clock.step, 64, 1.5, clock)
    assert list(points) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert points[64] == pytest.approx(2e-4)
    assert clock.now < 0.1


@pytest.mark.parametrize(("costs", "rows"), [(0.4, [1, 8, 4, 16]), (30.0, [1])])
def test_a_slow_model_within_its_time(costs: float, rows: list[int]) -> None:
    """The rows that matter most come first."""
    clock = Clock(costs)
    assert sorted(rows)[0] == 1
    points = measure(clock.step, 64, 1.5, clock)
    assert set(points) <= set(rows)
    assert 1 in points
    assert clock.now < 1.5 + 3 * costs


def test_kept_times_are_taken_and_bad_ones_measured_again(
    loaded: LoadedModel[StepModel], tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    runner = Runner(loaded.model, loaded.cache)
    free = loaded.cache.free_blocks
    times = StepTimes(str(tmp_path), loaded)
    first = times.points(runner, 40)
    assert list(first) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(0 < seconds < 1 for seconds in first.values())
    assert loaded.cache.free_blocks == free
    assert StepTimes(str(tmp_path), loaded).points(runner, 40) == first
    assert times.file.path is not None
    document = json.loads(times.file.path.read_text())
    foreign = document | {"key": document["key"] | {"device": "another"}}
    for damaged in ("", "{", "[]", "{}", json.dumps(foreign), json.dumps(document | {"seconds": {"1": -1}})):
        warnings.clear()
        times.file.path.write_text(damaged)
        assert times.points(runner, 40) != first
        assert "made again" in warnings.text
        assert json.loads(times.file.path.read_text())["key"] == document["key"]


def test_a_folder_that_cannot_be_written_is_one_warning(
    loaded: LoadedModel[StepModel], tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    times = StepTimes(str(tmp_path / "file" / "below"), loaded)
    assert times.points(Runner(loaded.model, loaded.cache), 8)
    assert [record.levelname for record in warnings.records] == ["WARNING"]
    assert "cannot be kept" in warnings.text


def test_where_they_are_kept(loaded: LoadedModel[StepModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "specserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(os.path.expanduser("~")) / ".cache" / "specserve"
    assert StepTimes("none", loaded).file.path is None


def test_a_verifier_with_a_budget_serves_the_same_text(
    llm: Path, ssms: list[Path], running: Services, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"draft_always": False, "step_times": str(tmp_path)}
    plain = running.verifier(llm)
    budgeted = running.verifier(llm, running.speculator(ssms[0]), **options)
    assert len(list(tmp_path.glob("step-times-*"))) == 1
    assert budgeted.metric("step_curve_seconds", rows="1") > 0
    for seed in range(3):
        for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": seed}):
            expected = plain.generate([5 + seed, 9], 100, sampling=sampling).token_ids
            assert budgeted.generate([5 + seed, 9], 100, sampling=sampling).token_ids == expected
    assert budgeted.metric("drafts_total") > 0, "the first drafts are tried"
    assert budgeted.metric("draft_seconds_count") > 0
