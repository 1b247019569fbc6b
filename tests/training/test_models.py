"""Pretraining and distillation, run as commands on a toy corpus, write folders that the services load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.transformer import LoadOptions, Transformer
from training.distill import distillation_loss

TIMEOUT_S = 240


def command(module: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    pieces = [f"Tom has {n} cats and {n + 1} dogs. He is happy.\n" * 40 for n in range(60)]
    file.write_text("<|endoftext|>".join(pieces))
    return file


def test_llm_and_ssm_from_text_to_served_folders(corpus: Path, tmp_path: Path) -> None:
    llm, ssm = tmp_path / "llm", tmp_path / "ssm"
    command("training.tokenizer", "--corpus", corpus, "--out", llm, "--vocab-size", 512, "--context", 64)
    shape = ["--hidden-size", 32, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--intermediate-size", 48]
    sizes = ["--context", 64, "--batch-tokens", 512, "--micro-batch-tokens", 256, "--tokens", 512 * 60]
    command("training.pretrain", "--corpus", corpus, "--tokenizer", llm, "--out", llm, "--no-compile", *shape, *sizes)
    losses = [entry["value"] for entry in json.loads((llm / "training.json").read_text())["held_out"]]
    assert losses[-1] < 0.7 * np.log(512), "the toy corpus is learnt"

    small = ["--hidden-size", 16, "--layers", 1, "--heads", 2, "--kv-heads", 1, "--intermediate-size", 24]
    sizes = ["--window", 48, "--batch", 8, "--tokens", 8 * 48 * 40, "--output-tokens", 3 * 64 * 48]
    command("training.distill", "--llm", llm, "--corpus", corpus, "--out", ssm, *small, *sizes)
    large, little = (Transformer.load(folder, LoadOptions(device="cpu")) for folder in (llm, ssm))
    assert large.weight_dtype is little.weight_dtype is torch.bfloat16
    assert little.parameters < large.parameters
    assert (llm / "tokenizer.json").read_bytes() == (ssm / "tokenizer.json").read_bytes()
    outputs = np.load(ssm / "checkpoints" / "outputs.npy")
    assert outputs.shape == (3 * 64, 48)


def test_the_distillation_loss_is_the_mean_divergence() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(student, teacher) == pytest.approx(float(expected), abs=1e-5)
    assert distillation_loss(teacher, teacher) == pytest.approx(0, abs=1e-6)
