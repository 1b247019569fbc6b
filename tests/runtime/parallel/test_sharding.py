"""Shards cover a model without gap or overlap, balance the stages, and are all that a rank reads of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from runtime.config import ModelConfig, read_config
from runtime.parallel.sharding import Degrees, Shard, UnsupportedDegrees
from runtime.weights import Checkpoint, LayerWeights, WeightLoader
from tests.tiny_models import SHAPES, write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), request.param, num_hidden_layers=3)


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read_config(write_model(tmp_path / "model", "llama-gqa", num_attention_heads=8, intermediate_size=96))


def test_the_parameters_are_hugging_faces(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert read_config(folder).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (Degrees(3, 1), "tensor_parallel is 3; a model of 8 heads, 2 KV heads and 96 intermediate units divides by"),
        (Degrees(16, 1), "divides by 1, 2, 4 or 8"),
        (Degrees(2, 3), "pipeline_parallel is 3; 2 layers have 1 to 2 stages"),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_those_that_do(
    degrees: Degrees, message: str, config: ModelConfig
) -> None:
    with pytest.raises(UnsupportedDegrees, match=message) as caught:
        Shard(config, degrees, rank=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("degrees", [Degrees(8, 1), Degrees(2, 2), Degrees(1, 1)])
def test_every_part_belongs_to_one_rank_of_a_stage(degrees: Degrees, config: ModelConfig) -> None:
    shards = [Shard(config, degrees, rank) for rank in range(degrees.ranks)]
    stage = shards[: degrees.tensor]
    assert [layer for shard in shards[:: degrees.tensor] for layer in shard.layers] == list(range(config.layers))
    assert [head for shard in stage for head in shard.heads] == list(range(config.heads))
    assert [unit for shard in stage for unit in shard.intermediate] == list(range(config.intermediate_size))
    assert [token for shard in stage for token in shard.vocabulary] == list(range(config.vocab_size))
    group = config.heads // config.kv_heads
    for shard in shards:
        assert {head // group for head in shard.heads} == set(shard.kv_heads)


def test_the_stage_with_the_vocabulary_has_fewer_layers(config: ModelConfig) -> None:
    # Llama 3.1 8B: embedding and head weigh as much as 4.8 layers.
    large = replace(
        config,
        hidden_size=4096,
        vocab_size=128256,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
    )
    assert [len(Shard(large, Degrees(1, 4), rank).layers) for rank in range(4)] == [5, 9, 9, 9]
    small = replace(config, vocab_size=10, tied_embeddings=True, layers=7)
    assert [len(Shard(small, Degrees(1, 3), rank).layers) for rank in range(3)] == [2, 2, 3]


class CountedFile:
    """A safetensors file that counts the numbers that are taken from it."""

    def __init__(self, file: Any, count: Callable[[int], None]) -> None:
        self._file = file
        self._count = count

    def get_slice(self, name: str) -> Any:
        file, count = self, self._count

        class Slice:
            def get_shape(self) -> Any:
                return file._file.get_slice(name).get_shape()

            def __getitem__(self, index: Any) -> torch.Tensor:
                tensor: torch.Tensor = file._file.get_slice(name)[index]
                count(tensor.numel())
                return tensor

        return Slice()


@pytest.mark.parametrize("degrees", [Degrees(2, 1), Degrees(1, 3), Degrees(2, 3)])
def test_a_rank_reads_its_shard_and_no_more(degrees: Degrees, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder)
    for rank in range(degrees.ranks):
        shard = Shard(config, degrees, rank)
        checkpoint = Checkpoint(folder)
        read: list[int] = []
        counted = {path: CountedFile(file, read.append) for path, file in checkpoint._open.items()}
        monkeypatch.setattr(checkpoint, "_open", counted)
        loader = WeightLoader(checkpoint, shard, CPU, torch.float32)
        held = sum(_size(layer) for layer in loader.layers())
        expected = len(shard.layers) * shard.local.layer_parameters
        if config.output_bias and shard.tensor_rank:
            expected -= len(shard.layers) * config.hidden_size
        if shard.is_first_stage:
            ends = loader.ends()
            matrices = [ends.embedding] if ends.head is ends.embedding else [ends.embedding, ends.head]
            held += sum(matrix.numel() for matrix in matrices) + ends.final_norm.numel()
            part = len(shard.vocabulary) * (1 if config.tied_embeddings else 2)
            expected += (part + 1) * config.hidden_size
        assert held == sum(read) == expected
        assert held < 0.65 * config.parameters


def _size(layer: LayerWeights) -> int:
    return sum(tensor.numel() for tensor in vars(layer).values() if tensor is not None)
