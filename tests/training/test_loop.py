"""A run learns, and one that is killed goes on to the very same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from training.loop import LoopSettings, TrainingRun
from training.pretrain import build_llama

SETTINGS = LoopSettings(steps=14, parts=2, tokens_per_step=64, learning_rate=3e-3, evaluate_every=5, checkpoint_every=4)


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return build_llama(50, 0, 32, hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=24)


def run(folder: Path, dies_at: int | None = None) -> TrainingRun:
    model = new_model()

    def loss_of_step(step: int, part: int) -> torch.Tensor:
        if step == dies_at:
            raise KeyboardInterrupt
        starts = np.random.default_rng((step, part)).integers(0, 20, 4)
        ids = torch.from_numpy(starts[:, None] + np.arange(8))  # counting: learnt in no time
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss / SETTINGS.parts

    training = TrainingRun(model, folder, SETTINGS, "steps")
    training.train(loss_of_step, lambda: float(training.step))
    return training


def test_the_schedule_rises_stays_and_falls() -> None:
    settings = LoopSettings(steps=1000, parts=1, tokens_per_step=1, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19:700] == [1.0] * 681
    assert rates[850] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies_at=10)
    resumed = run(tmp_path / "killed")
    assert [step for step, _ in resumed.held_out] == [5, 10, 14]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = run(tmp_path / "killed", dies_at=13)  # nothing is left to do, so that the step is never reached
    assert again.step == SETTINGS.steps
