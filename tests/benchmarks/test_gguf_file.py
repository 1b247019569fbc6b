"""GGUF files hold the weights, the shape and the vocabulary of the folder that they were made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.configurations import Precision
from benchmarks.peers.gguf_file import CannotConvert, interleave, write_gguf
from tests.tiny_models import VOCAB, write_model


def read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def rotate_halves(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Hugging Face: (x_i, x_{i+d/2})."""
    low, high = x.chunk(2)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()])


def rotate_pairs(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """llama.cpp: (x_{2i}, x_{2i+1})."""
    even, odd = x[0::2], x[1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], 1).flatten()


def test_interleaved_rows_rotate_to_the_same_scores() -> None:
    torch.manual_seed(0)
    heads, head_dim, hidden = 3, 8, 5
    query, key = (torch.randn(heads * head_dim, hidden) for _ in range(2))
    x, y = torch.randn(hidden), torch.randn(hidden)
    angle = torch.randn(head_dim // 2)
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        theirs = rotate_halves((query @ x)[rows], angle) @ rotate_halves((key @ y)[rows], 2 * angle)
        q, k = (interleave(weight, heads) for weight in (query, key))
        ours = rotate_pairs((q @ x)[rows], angle) @ rotate_pairs((k @ y)[rows], 2 * angle)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_are_those_of_the_folder(precision: Precision, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    write_gguf(folder, tmp_path / "tiny.gguf", precision)
    tensors = {tensor.name: tensor for tensor in read(tmp_path / "tiny.gguf").tensors}
    source = load_file(folder / "model.safetensors")
    assert len(tensors) == len(source)
    expected = source["model.layers.1.mlp.down_proj.weight"].to(getattr(torch, precision)).float().numpy()
    stored = tensors["blk.1.ffn_down.weight"]
    np.testing.assert_array_equal(gguf.quants.dequantize(stored.data, stored.tensor_type), expected)
    keys = tensors["blk.0.attn_k.weight"]
    wanted = interleave(source["model.layers.0.self_attn.k_proj.weight"], 2).to(getattr(torch, precision)).float()
    np.testing.assert_array_equal(gguf.quants.dequantize(keys.data, keys.tensor_type), wanted.numpy())
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_shape_and_vocabulary_are_those_of_the_folder(tmp_path: Path) -> None:
    write_gguf(write_model(tmp_path / "tiny"), tmp_path / "tiny.gguf", "float32")
    reader = read(tmp_path / "tiny.gguf")

    def value(name: str) -> object:
        field = reader.get_field(name)
        assert field is not None, name
        return field.contents()

    assert value("general.architecture") == "llama"
    assert (value("llama.block_count"), value("llama.attention.head_count_kv")) == (2, 2)
    assert value("llama.attention.key_length") == 16
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert len(tokens) == len(kinds) == VOCAB
    assert (tokens[0], kinds[0]) == ("<|endoftext|>", gguf.TokenType.CONTROL)
    assert value("tokenizer.ggml.eos_token_id") == 0


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    write_gguf(write_model(tmp_path / "tiny", "llama-mha-tied"), tmp_path / "tiny.gguf", "float32")
    assert "output.weight" not in {tensor.name for tensor in read(tmp_path / "tiny.gguf").tensors}


@pytest.mark.parametrize("shape", ["llama3-rope", "llama-linear-rope-bias", "qwen3"])
def test_what_is_not_known_is_refused(shape: str, tmp_path: Path) -> None:
    with pytest.raises(CannotConvert, match="only Llama models without biases and with plain rotary positions"):
        write_gguf(write_model(tmp_path / "tiny", shape), tmp_path / "tiny.gguf", "float32")
