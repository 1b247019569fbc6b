"""What the verifier asks of a model, whether it runs on one device or on a group of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kernels.backend import Backend
from runtime.batch import Segment
from runtime.config import ModelConfig
from runtime.kv_cache import KVCache


class LoadedPart(Protocol):
    """A model, or a rank's part of one. config: of the whole model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weight_dtype(self) -> torch.dtype: ...

    def new_cache(self, memory_fraction: float, max_sequences: int, blocks: int = 0) -> KVCache:
        """See Transformer.new_cache."""


class StepModel(LoadedPart, Protocol):
    """A model that takes steps; one thread owns it and its cache."""

    def prepare_steps(self, sequences: int) -> int:
        """See Transformer.prepare_steps."""

    @property
    def argmax(self) -> list[int] | None:
        """See Transformer."""

    def step(self, segments: Sequence[Segment], rows: Sequence[int], cache: KVCache) -> torch.Tensor:
        """Compute the segments' rows and return the next-token logits of some of them.

        They are float32 [len(rows), vocab], contiguous, and overwritten by the next step.

        Every cache must have the blocks that its rows write. A row's result depends on what it sees alone.
        """

    def compact(self, cache: KVCache, sources: list[int], targets: list[int]) -> None:
        """Move the entries in slots `sources` to slots `targets`, in all layers, as if all were read first."""
