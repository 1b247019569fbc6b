"""Weights of a Hugging Face folder: safetensors, one file or sharded, read tensor by tensor.

Knows nothing of how they are multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from runtime.config import ModelConfig, UnsupportedModel


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Projections are [outputs, inputs], as in the checkpoint.

    qkv: query, key and value projections stacked; gate_up: gate and up projections stacked.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class ModelWeights:
    """embedding, head: [vocab, hidden]; the same tensor when they are tied."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor

    def count(self) -> int:
        """Number of parameters; a tied head counts once."""
        tensors = [self.embedding, self.final_norm, *(t for layer in self.layers for t in vars(layer).values())]
        if self.head is not self.embedding:
            tensors.append(self.head)
        return sum(tensor.numel() for tensor in tensors if tensor is not None)


class Checkpoint:
    """The tensors of a folder, by name.

    Raises:
        UnsupportedModel: no safetensors file, a shard missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _locate(folder)
        self._open = {path: _open_file(path) for path in sorted(set(self._files.values()))}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as stored; UnsupportedModel when it is missing or has another shape."""
        if name not in self._files:
            raise UnsupportedModel(f"{self.folder}: the checkpoint lacks the tensor {name}")
        tensor: torch.Tensor = self._open[self._files[name]].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"{self.folder}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}"
            )
        return tensor


def _locate(folder: Path) -> Mapping[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise UnsupportedModel(f"{index} is not a safetensors index: {error!r}") from None
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise UnsupportedModel(f"{folder}: neither model.safetensors nor {index.name} is there; only safetensors load")
    return dict.fromkeys(_open_file(single).keys(), single)


def _open_file(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} is missing; the index names it") from None
    except SafetensorError as error:
        raise UnsupportedModel(f"{path} is damaged or truncated ({error}); copy or download it again") from None


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that the embedding is stored in; the other matrices share it."""
    name = "model.embed_tokens.weight"
    if name not in checkpoint:
        raise UnsupportedModel(f"{checkpoint.folder}: the checkpoint lacks the tensor {name}")
    dtype: torch.dtype = checkpoint._open[checkpoint._files[name]].get_slice(name)[:1].dtype
    return dtype


def load_weights(checkpoint: Checkpoint, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    """Read all weights onto a device in `dtype`."""

    def read(name: str, *shape: int) -> torch.Tensor:
        return checkpoint.read(name, shape).to(device=device, dtype=dtype)

    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = read("model.embed_tokens.weight", vocab, hidden)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_load_layer(checkpoint, config, index, device, dtype) for index in range(config.layers)),
        final_norm=read("model.norm.weight", hidden),
        head=embedding if config.tied_embeddings else read("lm_head.weight", vocab, hidden),
    )


def _load_layer(
    checkpoint: Checkpoint, config: ModelConfig, index: int, device: torch.device, dtype: torch.dtype
) -> LayerWeights:
    def read(name: str, *shape: int) -> torch.Tensor:
        return checkpoint.read(f"model.layers.{index}.{name}", shape).to(device=device, dtype=dtype)

    def stack(kind: str, names: Mapping[str, int], *inputs: int) -> torch.Tensor:
        return torch.cat([read(f"{name}.{kind}", outputs, *inputs) for name, outputs in names.items()])

    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.heads * dim, config.kv_heads * dim
    qkv = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    return LayerWeights(
        input_norm=read("input_layernorm.weight", hidden),
        qkv=stack("weight", qkv, hidden),
        qkv_bias=stack("bias", qkv) if config.attention_bias else None,
        query_norm=read("self_attn.q_norm.weight", dim) if config.head_norm else None,
        key_norm=read("self_attn.k_norm.weight", dim) if config.head_norm else None,
        output=read("self_attn.o_proj.weight", hidden, query),
        output_bias=read("self_attn.o_proj.bias", hidden) if config.output_bias else None,
        post_attention_norm=read("post_attention_layernorm.weight", hidden),
        gate_up=stack("weight", gate_up, hidden),
        down=read("mlp.down_proj.weight", hidden, inner),
    )
