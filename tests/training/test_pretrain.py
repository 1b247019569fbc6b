"""Pretraining as it is run: one process, several, and a run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import write_tokenizer

SHAPE = {"hidden-size": 32, "layers": 2, "heads": 4, "intermediate-size": 48, "context": 64, "window": 32}
TEXT = "the cat sat on the mat and the dog ran to the house where a child was singing a song of summer days. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tokenizer(folder)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(TEXT * 4 for _ in range(60)))
    return folder


def run(corpus: Path, out: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    program = ["-m", "training.pretrain"]
    if processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    shape = [f"--{name}={value}" for name, value in SHAPE.items()]
    files = [f"--corpus={corpus / 'text.txt'}", f"--tokenizer={corpus}", f"--out={out}"]
    sizes = ["--batch-tokens=256", "--micro-batch-tokens=64", "--no-compile", "--threads=1"]
    command = [sys.executable, *program, *files, *shape, *sizes, *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def pretrain(corpus: Path, out: Path, *flags: str, processes: int = 1) -> dict[str, torch.Tensor]:
    done = run(corpus, out, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training tokens") == 1, "one of them tells"
    return load_file(out / "model.safetensors")


def test_two_processes_learn_what_one_does(corpus: Path, tmp_path: Path) -> None:
    one = pretrain(corpus, tmp_path / "one", "--tokens=5120")
    two = pretrain(corpus, tmp_path / "two", "--tokens=5120", processes=2)
    assert one.keys() == two.keys()
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0.05, atol=0.01)


def test_a_run_goes_on_where_it_ended(corpus: Path, tmp_path: Path) -> None:
    part = pretrain(corpus, tmp_path / "part", "--tokens=2560")
    longer = pretrain(corpus, tmp_path / "part", "--tokens=5120")
    again = pretrain(corpus, tmp_path / "part", "--tokens=5120")
    steps = [entry["step"] for entry in json.loads((tmp_path / "part" / "training.json").read_text())["held_out"]]
    assert steps == [10, 20]
    assert not any(torch.equal(part[name], longer[name]) for name in longer)
    assert all(torch.equal(longer[name], again[name]) for name in longer), "nothing was left to do"


def test_micro_batches_smaller_than_a_window_are_of_one_window(corpus: Path, tmp_path: Path) -> None:
    whole = pretrain(corpus, tmp_path / "whole", "--tokens=512", "--micro-batch-tokens=256")
    parts = pretrain(corpus, tmp_path / "parts", "--tokens=512", "--micro-batch-tokens=1")
    for name, weights in whole.items():
        torch.testing.assert_close(parts[name], weights, rtol=0.05, atol=0.01)


def test_both_ways_of_attention_learn_the_same(corpus: Path, tmp_path: Path) -> None:
    sdpa = pretrain(corpus, tmp_path / "sdpa", "--tokens=512")
    eager = pretrain(corpus, tmp_path / "eager", "--tokens=512", "--attention=eager")
    for name, weights in sdpa.items():
        torch.testing.assert_close(eager[name], weights, rtol=0.05, atol=0.01)
    assert (tmp_path / "eager" / "config.json").read_text() == (tmp_path / "sdpa" / "config.json").read_text()


@pytest.mark.parametrize("tokens", [16, 96])
def test_a_batch_that_cannot_be_shared_is_refused(tokens: int, corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, tmp_path / "out", f"--batch-tokens={tokens}", processes=2)
    assert done.returncode != 0
    assert "give a multiple of 64" in " ".join(done.stderr.replace("│", " ").split())
