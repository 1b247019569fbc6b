"""Pretraining, going on deeper, and tuning, run as commands on a toy corpus, write folders that the services load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.transformer import LoadOptions, Transformer

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
    llm, deeper = tmp_path / "llm", tmp_path / "deeper"
    command("training.tokenizer", "--corpus", corpus, "--out", llm, "--vocab-size", 512, "--context", 64)
    shape = ["--hidden-size", 32, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--intermediate-size", 48]
    sizes = ["--context", 64, "--batch-tokens", 512, "--micro-batch-tokens", 256, "--tokens", 512 * 60]
    command("training.pretrain", "--corpus", corpus, "--tokenizer", llm, "--out", llm, "--no-compile", *shape, *sizes)
    losses = [entry["value"] for entry in json.loads((llm / "training.json").read_text())["held_out"]]
    assert losses[-1] < 0.7 * np.log(512), "the toy corpus is learnt"

    shape[3], sizes[-1] = 3, 512 * 10
    folders = ["--corpus", corpus, "--tokenizer", llm, "--init", llm, "--out", deeper]
    command("training.pretrain", *folders, "--no-compile", *shape, *sizes)
    again = [entry["value"] for entry in json.loads((deeper / "training.json").read_text())["held_out"]]
    assert again[-1] < losses[-1], "it goes on from what is learnt"

    prompts = tmp_path / "prompts.jsonl"
    command("training.prompts", "--corpus", corpus, "--count", 30, "--out", prompts)
    sizes = ["--ssm-size", "1x16", "--tokens", 20_000, "--new-tokens", 24, "--threads", 1]
    command("training.tune", "--llm", deeper, "--prompts", prompts, "--out", tmp_path / "tuned", *sizes)
    large, little = (
        Transformer.load(folder, LoadOptions(device="cpu")) for folder in (deeper, tmp_path / "tuned" / "ssm-1")
    )
    assert large.weight_dtype is little.weight_dtype is torch.bfloat16
    assert large.config.layers == 3
    assert little.config.parameters < large.config.parameters
