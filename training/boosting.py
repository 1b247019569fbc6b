"""Which of the LLM's continuations a set of small models does not cover yet (SpecInfer, section 3, boost-tuning).

A continuation is cut into segments of a few tokens. A segment with the text before it is one training sample: a prompt
and the LLM's continuation of it. A model covers it when its own first choice is the LLM's first choice at each of the
segment's positions, so that it would have drafted the whole segment; covered segments are dropped for the next model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Coverage:
    """How much of the continuations some model of the set covers."""

    segments: int
    covered_segments: int
    prompts: int
    covered_prompts: int

    def __str__(self) -> str:
        share = self.covered_segments / max(1, self.segments)
        return (
            f"{self.covered_segments:,} of {self.segments:,} segments ({share:.1%}) and all of "
            f"{self.covered_prompts:,} of {self.prompts:,} continuations"
        )


class UncoveredSegments:
    """The positions that the next model learns. flags[i] is bool [new tokens of continuation i]."""

    def __init__(self, lengths: Sequence[int], segment: int) -> None:
        """lengths: new tokens of each continuation. segment: tokens of a segment; the last one may be shorter."""
        if segment < 1:
            raise ValueError(f"segments of {segment} tokens; at least 1")
        self.flags: list[Flags] = [np.ones(length, dtype=np.bool_) for length in lengths]
        self._segment = segment

    def cover(self, hits: Sequence[Flags]) -> None:
        """Drop the segments at all of whose positions a model's first choice was right; hits[i] is bool [new]."""
        for flags, own in zip(self.flags, hits, strict=True):
            for start in range(0, len(flags), self._segment):
                part = slice(start, start + self._segment)
                if own[part].all():
                    flags[part] = False

    def left(self) -> list[int]:
        """The continuations that have an uncovered segment."""
        return [index for index, flags in enumerate(self.flags) if flags.any()]

    def coverage(self) -> Coverage:
        segments = [-(-len(flags) // self._segment) for flags in self.flags]
        uncovered = [int(flags[:: self._segment].sum()) for flags in self.flags]
        prompts = len(self.flags)
        return Coverage(sum(segments), sum(segments) - sum(uncovered), prompts, prompts - len(self.left()))
