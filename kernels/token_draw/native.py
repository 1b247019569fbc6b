"""Draws of tokens on the CPU, all rows of a step in one call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from kernels.blocks import check_tensor
from kernels.native.shared_library import load
from kernels.native.structures import pointer


def draw_tokens(
    logits: torch.Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """Draw i, by the Gumbel-max trick: argmax over tokens of logits[rows[i]] / temperature + g(seed, position, token).

    logits: float32 [n, vocab]. temperatures: above 0. seeds: 0..2^64 - 1. The noise g is that of `speculation.noise`,
    and so is the draw: a function of its own row, seed and position.

    Raises:
        ValueError: another shape or type, or a temperature that is not above 0.
        IndexError: a row that logits has not.
    """
    check_tensor("logits", logits, (None, None), torch.float32)
    count, vocab = len(rows), logits.shape[1]
    if count == 0:
        return []
    if min(rows) < 0 or max(rows) >= len(logits):
        raise IndexError(f"rows are {min(rows)}..{max(rows)}; logits has {len(logits)}")
    if min(temperatures) <= 0:
        raise ValueError(f"a temperature is {min(temperatures)}; it must be above 0")
    # bound to names: the call gets bare addresses
    arrays: tuple[array[int] | array[float], ...] = (
        array("q", rows),
        array("f", temperatures),
        array("Q", seeds),
        array("q", positions),
        tokens := array("q", bytes(8 * count)),
    )
    addresses = [each.buffer_info()[0] for each in arrays]
    load().specserve_draw_tokens(pointer(logits), vocab, count, *addresses)
    return tokens.tolist()
