"""An order arrives as it was sent, whatever its size."""

from __future__ import annotations

import pytest
import torch

from runtime.batch import FlatBatch, Segment
from runtime.kv_cache import CachedSequence
from runtime.parallel.orders import AcceptedPaths, StepPlan, unpack


@pytest.mark.parametrize("nodes", [1, 63, 64, 200])
def test_a_plan_survives_packing(nodes: int) -> None:
    cache = CachedSequence(blocks=list(range(40, 0, -1)))
    masks = [(1 << node) | 1 for node in range(nodes)]  # bit 63 is the sign of a word
    segments = [
        Segment.chain(cache, [1, 2, 128_255], 7),
        Segment.tree(cache, range(nodes), [0] + [1] * (nodes - 1), masks, 10),
    ]
    batch = FlatBatch.of(segments, torch.device("cpu"))
    plan = StepPlan(batch, torch.tensor([2, 0]))
    arrived = unpack(plan.pack())
    assert isinstance(arrived, StepPlan)
    assert torch.equal(arrived.rows, plan.rows)
    for name, tensor in vars(batch).items():
        assert torch.equal(getattr(arrived.batch, name), tensor), name
        assert getattr(arrived.batch, name).dtype is tensor.dtype, name
        assert getattr(arrived.batch, name).is_contiguous(), name


def test_accepted_paths_survive_packing() -> None:
    paths = AcceptedPaths(torch.tensor([[7, 2_000_000_000, 3], [5, 6, 1]]))
    arrived = unpack(paths.pack())
    assert isinstance(arrived, AcceptedPaths)
    assert torch.equal(arrived.moves, paths.moves)
    assert arrived.moves.dtype is torch.int64
