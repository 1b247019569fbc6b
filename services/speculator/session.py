"""A sequence as one small model knows it, and what is asked of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.kv_cache import CachedSequence
from speculation.calibration import Calibration
from speculation.children import ChildSelection
from speculation.expansion import Slots
from speculation.logits import LogitsPipeline

SessionKey = tuple[int, int]
"""(stream, sequence id): sequence ids belong to a stream."""


class DraftOrder(NamedTuple):
    """What tree is wanted; see DraftRequest in speculator.proto."""

    key: SessionKey
    nodes: int
    depth: int
    widths: tuple[int, ...]
    selection: ChildSelection
    min_confidence: float = 0.0
    lookup_only: bool = False


@dataclass(eq=False)
class Session:
    """tokens: all committed tokens; the last is the root of the next tree. cache: KV of tokens[:cache.length].

    slots: the evaluated nodes of the last draft, whose KV stands behind cache.length; None when there are none.
    """

    tokens: list[int]
    pipeline: LogitsPipeline
    cache: CachedSequence = field(default_factory=CachedSequence)
    slots: Slots | None = None

    @property
    def uncomputed(self) -> int:
        """Tokens that are not in the cache, the last one included."""
        return len(self.tokens) - self.cache.length


@dataclass(frozen=True)
class DrafterSettings:
    """beam, min_confidence: of best-first growth. stream: tells the random draws of different models apart.

    calibration: of the model, against the LLM it drafts for.
    """

    prefill_chunk: int
    beam: int
    min_confidence: float
    stream: int
    calibration: Calibration
