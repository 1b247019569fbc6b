"""Weights of a Hugging Face folder: safetensors, one file or sharded, read tensor by tensor.

Knows nothing of how they are multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.config import UnsupportedModel
from runtime.parallel.sharding import Shard


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, or a rank's part of it. Projections are [outputs, inputs], as in the checkpoint.

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
class EndWeights:
    """What stands before and behind the layers. embedding, head: [vocab, hidden]; one tensor when they are tied."""

    embedding: torch.Tensor
    final_norm: torch.Tensor
    head: torch.Tensor


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

    def read(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """Rows and columns of a tensor as stored, all where None; what is not asked for is not read.

        Raises:
            UnsupportedModel: it is missing or has another shape.
        """
        stored = self._slice(name)
        if (have := tuple(stored.get_shape())) != shape:
            raise UnsupportedModel(f"{self.folder}: {name} has shape {list(have)}, config.json says {list(shape)}")
        part: torch.Tensor = stored[_indices(rows)] if columns is None else stored[_indices(rows), _indices(columns)]
        return part.contiguous()

    def stored_dtype(self) -> torch.dtype:
        """The type that the embedding is stored in; the other matrices share it."""
        dtype: torch.dtype = self._slice("model.embed_tokens.weight")[:1].dtype
        return dtype

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise UnsupportedModel(f"{self.folder}: the checkpoint lacks the tensor {name}")
        return self._open[self._files[name]].get_slice(name)


def _indices(part: range | None) -> slice:
    return slice(None) if part is None else slice(part.start, part.stop)


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


class WeightLoader:
    """Reads one rank's part of the weights onto a device in `dtype`."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._shard = shard
        self._device = device
        self.dtype = dtype

    def ends(self) -> EndWeights:
        """The rank's part of the vocabulary."""
        config = self._shard.config
        matrix, part = (config.vocab_size, config.hidden_size), self._shard.vocabulary
        embedding = self._read("model.embed_tokens.weight", matrix, part)
        return EndWeights(
            embedding=embedding,
            final_norm=self._read("model.norm.weight", (config.hidden_size,)),
            head=embedding if config.tied_embeddings else self._read("lm_head.weight", matrix, part),
        )

    def layers(self) -> Iterator[LayerWeights]:
        """The rank's part of its layers, in order, each read when it is asked for."""
        for index in self._shard.layers:
            yield self._layer(f"model.layers.{index}.")

    def _layer(self, prefix: str) -> LayerWeights:
        shard, config = self._shard, self._shard.config
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        query = {"q_proj": (config.heads, shard.heads)}
        key_value = dict.fromkeys(("k_proj", "v_proj"), (config.kv_heads, shard.kv_heads))
        qkv = {
            f"{prefix}self_attn.{name}": (heads * dim, range(part.start * dim, part.stop * dim))
            for name, (heads, part) in (query | key_value).items()
        }
        gate_up = {f"{prefix}mlp.{name}": (inner, shard.intermediate) for name in ("gate_proj", "up_proj")}
        heads_part = range(shard.heads.start * dim, shard.heads.stop * dim)
        # The bias of a sum over ranks is added by one of them.
        output_bias = config.output_bias and shard.tensor_rank == 0
        return LayerWeights(
            input_norm=self._read(f"{prefix}input_layernorm.weight", (hidden,)),
            qkv=self._stack("weight", qkv, (hidden,)),
            qkv_bias=self._stack("bias", qkv) if config.attention_bias else None,
            query_norm=self._read(f"{prefix}self_attn.q_norm.weight", (dim,)) if config.head_norm else None,
            key_norm=self._read(f"{prefix}self_attn.k_norm.weight", (dim,)) if config.head_norm else None,
            output=self._read(f"{prefix}self_attn.o_proj.weight", (hidden, config.heads * dim), columns=heads_part),
            output_bias=self._read(f"{prefix}self_attn.o_proj.bias", (hidden,)) if output_bias else None,
            post_attention_norm=self._read(f"{prefix}post_attention_layernorm.weight", (hidden,)),
            gate_up=self._stack("weight", gate_up, (hidden,)),
            down=self._read(f"{prefix}mlp.down_proj.weight", (hidden, inner), columns=shard.intermediate),
        )

    def _stack(self, kind: str, parts: Mapping[str, tuple[int, range]], inputs: tuple[int, ...] = ()) -> torch.Tensor:
        """parts: outputs of the whole projection, and those of this rank, by name."""
        return torch.cat(
            [self._read(f"{name}.{kind}", (outputs, *inputs), rows=part) for name, (outputs, part) in parts.items()]
        )

    def _read(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        return self._checkpoint.read(name, shape, rows, columns).to(device=self._device, dtype=self.dtype)
