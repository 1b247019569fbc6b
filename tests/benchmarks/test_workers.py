"""Measuring in a process of its own: its result, and its failure."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.step_time import NODE_COUNTS
from benchmarks.workers import WorkerFailed, step_times
from tests.tiny_models import write_model


def test_a_workers_result_comes_back(tmp_path: Path) -> None:
    llm = write_model(tmp_path / "tiny")
    times = asyncio.run(step_times({"model": str(llm), "context": 8, "repeats": 2, "threads": 1}))
    assert (times.model, times.context, tuple(times.median_ms)) == ("tiny", 8, NODE_COUNTS)
    assert all(ms > 0 for ms in times.median_ms.values())


def test_a_worker_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"exit code 1.*nowhere: no such folder"):
        asyncio.run(step_times({"model": str(tmp_path / "nowhere")}))
