"""What a set of models covers, segment by segment."""

from __future__ import annotations

import numpy as np
import pytest

from training.boosting import Coverage, UncoveredSegments


def flags(text: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array([letter == "1" for letter in text])


def test_whole_segments_are_dropped_and_stay_dropped() -> None:
    uncovered = UncoveredSegments([7, 4], segment=3)
    assert uncovered.coverage() == Coverage(segments=5, covered_segments=0, prompts=2, covered_prompts=0)
    uncovered.cover([flags("1111101"), flags("0111")])
    assert [own.tolist() for own in uncovered.flags] == [
        flags("0001110").tolist(),  # the second segment has a miss; the last one is short and hit
        flags("1110").tolist(),
    ]
    assert uncovered.coverage() == Coverage(segments=5, covered_segments=3, prompts=2, covered_prompts=0)
    uncovered.cover([flags("0001110"), flags("0000")])
    assert uncovered.left() == [1]
    assert uncovered.coverage() == Coverage(segments=5, covered_segments=4, prompts=2, covered_prompts=1)
    assert str(uncovered.coverage()) == "4 of 5 segments (80.0%) and all of 1 of 2 continuations"


def test_segments_of_one_token_are_positions() -> None:
    uncovered = UncoveredSegments([4], segment=1)
    uncovered.cover([flags("0110")])
    assert uncovered.flags[0].tolist() == flags("1001").tolist()


def test_a_segment_needs_a_token() -> None:
    with pytest.raises(ValueError, match="segments of 0 tokens"):
        UncoveredSegments([4], segment=0)
