"""An inflated model says what the small one says, and is about as large as was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.inflate import INFLATED_FROM, CannotInflate, Shape, inflate
from tests.tiny_models import VOCAB, hugging_face_greedy, write_model


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.as_tensor(model(ids).logits)


@pytest.mark.parametrize("shape", ["llama-mha-tied", "llama-gqa"])
@pytest.mark.parametrize("factor", [1.4, 5, 30])
def test_logits_and_greedy_text_are_those_of_the_small_model(shape: str, factor: float, tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "small", shape), tmp_path / "large"
    size = sum(tensor.numel() for tensor in load_file(small / "model.safetensors").values())
    inflate(small, large, round(factor * size))
    ids = torch.arange(3, VOCAB, 7)[None]
    torch.testing.assert_close(logits(large, ids), logits(small, ids), rtol=1e-4, atol=1e-4)
    prompt = [5, 77, 200, 13]
    assert hugging_face_greedy(large, prompt, 40) == hugging_face_greedy(small, prompt, 40)


def test_the_size_is_about_what_was_asked_for(tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "small"), tmp_path / "large"
    size = sum(tensor.numel() for tensor in load_file(small / "model.safetensors").values())
    assert inflate(small, large, 12 * size) == Shape(copies=4, layers=2)
    grown = sum(tensor.numel() for tensor in load_file(large / "model.safetensors").values())
    assert 0.6 < grown / (12 * size) < 1.4


def test_the_folder_says_whose_text_it_is_and_has_its_tokenizer(tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "small"), tmp_path / "large"
    inflate(small, large, 300_000)
    config = json.loads((large / "config.json").read_text())
    assert config[INFLATED_FROM] == "small"
    assert config["head_dim"] == 16
    assert (large / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("shape", "parameters", "message"),
    [("llama-gqa", 1000, "cannot reach 1000 parameters; ask for"), ("qwen3", 10**6, "not qwen3")],
)
def test_what_cannot_be_inflated_is_named(shape: str, parameters: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CannotInflate, match=message):
        inflate(write_model(tmp_path / "small", shape), tmp_path / "large", parameters)
