"""Averages lie on the line between a model and its further trained version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.average import average
from training.growth import CannotGrow, start_from
from training.pretrain import build_llama


def llama(path: Path, layers: int, width: int = 32) -> Path:
    build_llama(60, 0, 32, width, layers, heads=2, kv_heads=1, intermediate_size=48).save_pretrained(path)
    return path


def test_the_ends_and_the_middle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start, trained = llama(tmp_path / "start", 2), llama(tmp_path / "trained", 3)
    grown = build_llama(60, 0, 32, 32, 3, heads=2, kv_heads=1, intermediate_size=48)
    start_from(grown, start)
    ends = {share: dict(average(start, trained, share).named_parameters()) for share in (0.0, 0.25, 1.0)}
    for name, parameter in grown.named_parameters():
        torch.testing.assert_close(ends[0.0][name], parameter)
        torch.testing.assert_close(ends[0.25][name], 0.75 * parameter + 0.25 * ends[1.0][name])


def test_models_of_other_widths_have_no_average(tmp_path: Path) -> None:
    with pytest.raises(CannotGrow, match=r"the new model has \[60, 64\]"):
        average(llama(tmp_path / "start", 2), llama(tmp_path / "trained", 2, width=64), 0.5)
