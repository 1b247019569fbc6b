"""Folders as Hugging Face writes them load; broken ones say in one line what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from runtime.config import UnsupportedModel
from runtime.transformer import LoadOptions, Transformer
from tests.tiny_models import write_model

CPU = LoadOptions(device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "llama-gqa")


def test_a_sharded_checkpoint_loads_like_a_whole_one(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert Transformer.load(sharded, CPU).config.parameters == Transformer.load(folder, CPU).config.parameters
    next(sharded.glob("model-*.safetensors")).unlink()
    with pytest.raises(UnsupportedModel, match="is missing; the index names it"):
        Transformer.load(sharded, CPU)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float16, "int8", torch.int8),
        (torch.float32, "int8", torch.int8),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_the_type_of_the_weights(stored: torch.dtype, asked: Any, expected: torch.dtype, folder: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    assert Transformer.load(folder, LoadOptions(device="cpu", dtype=asked)).weight_dtype is expected


def _set(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def _drop(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_set(model_type="mamba"), "model family 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3"),
        (_set(hidden_act="gelu"), "activation 'gelu' is not supported"),
        (_set(mlp_bias=True), "biases in the MLP are not supported"),
        (_set(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "RoPE type 'yarn' is not supported"),
        (_set(quantization_config={"bits": 4}), "quantized checkpoints are not supported"),
        (_set(hidden_size=80), r"has shape \[320, 64\], config.json says \[320, 80\]"),
        (_drop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (_drop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (_drop("model.embed_tokens.weight"), "lacks the tensor model.embed_tokens.weight"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "damaged or truncated"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, not an object"),
    ],
)
def test_a_broken_folder_is_refused(damage: Callable[[Path], None], complaint: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UnsupportedModel, match=complaint) as caught:
        Transformer.load(folder, CPU)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no such model folder"):
        Transformer.load(tmp_path / "nowhere", CPU)


def test_a_sliding_window_shortens_the_context(folder: Path) -> None:
    _set(model_type="mistral", sliding_window=100)(folder)
    assert Transformer.load(folder, CPU).config.context_length == 100
