"""Held-out figures and calibration, on models whose figures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.transformer import LoadOptions, Transformer
from tests.tiny_models import write_model, write_relative
from training.continuations import Continuation, Job, make_shard
from training.evaluation import BINS, HeldOut, Reliability, evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llm"), scale=3.0)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Transformer:
    return load(folder)


@pytest.fixture(scope="module")
def held_out(llm: Transformer) -> list[Continuation]:
    rng = np.random.default_rng(0)
    jobs = [Job(tuple(rng.integers(1, 300, 9).tolist()), samples=True) for _ in range(24)]
    return make_shard(llm, jobs, 24, 0, lambda count: None)


def load(folder: Path) -> Transformer:
    return Transformer.load(folder, LoadOptions(device="cpu"))


def test_the_llm_drafts_perfectly_for_itself(llm: Transformer, held_out: list[Continuation]) -> None:
    figures = evaluate(llm, llm, held_out)
    assert figures.greedy[0] == figures.shared_noise[0] == 1
    assert figures.overlap == pytest.approx(1, abs=1e-5)
    assert figures.positions == sum(continuation.new for continuation in held_out)
    assert figures.calibration.greedy_temperature == pytest.approx(0.2, abs=0.01), "sure: the end of the grid"
    assert figures.greedy_reliability.error < figures.raw_greedy.error


def test_a_stranger_is_never_right_and_knows_it(llm: Transformer, held_out: list[Continuation], tmp_path: Path) -> None:
    figures = evaluate(llm, load(write_model(tmp_path, seed=5, scale=3.0)), held_out)
    assert figures.greedy[4] < 0.1
    assert figures.calibration.greedy_temperature > 2
    assert_calibrated(figures)


def test_a_relative_is_calibrated(llm: Transformer, folder: Path, held_out: list[Continuation], tmp_path: Path) -> None:
    figures = evaluate(llm, load(write_relative(tmp_path, folder, noise=0.08)), held_out)
    assert 0.2 < figures.greedy[0] < figures.greedy[1] <= figures.greedy[4] < 1
    assert 0.2 < figures.overlap < 1
    assert_calibrated(figures)
    table = figures.measurements()["greedy_reliability"]
    assert sum(row["count"] for row in table) == 5 * sum(continuation.new for continuation in held_out[12:])


def assert_calibrated(figures: HeldOut) -> None:
    assert figures.greedy_reliability.error <= figures.raw_greedy.error + 0.01
    assert figures.greedy_reliability.error < 0.08
    assert figures.noise_reliability.error < 0.08


def test_reliability_is_the_mean_distance_of_the_bins() -> None:
    reliability = Reliability()
    reliability.add(torch.tensor([0.05, 0.95, 0.95, 1.0]), torch.tensor([False, True, False, True]))
    # the lowest bin is off by 0.05, the highest has 2.9 estimated and 2 true
    assert reliability.error == pytest.approx((0.05 + 0.9) / 4)
    assert [row["count"] for row in reliability.table()] == [1, 3]
    assert len(reliability.count) == BINS
