"""What rank 0 tells the others, as vectors of numbers: the plan of a step, then the paths that it has accepted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from runtime.batch import FlatBatch

_PLAN, _PATHS = 1, 2  # the first number of an order
_SIZES = 6  # numbers of a plan that say how long the parts behind them are


@dataclass(frozen=True)
class StepPlan:
    """One forward pass. rows: int64 [wanted], rows of the batch whose logits are wanted."""

    batch: FlatBatch
    rows: torch.Tensor

    def to(self, device: torch.device) -> StepPlan:
        return StepPlan(self.batch.to(device), self.rows.to(device))

    def pack(self) -> torch.Tensor:
        """int32 on the CPU; token ids, positions and slots are below 2³¹."""
        batch = self.batch
        (rows, words), (sequences, blocks) = batch.masks.shape, batch.block_tables.shape
        sizes = torch.tensor([_PLAN, rows, words, sequences, blocks, len(self.rows)])
        narrow = [sizes, batch.token_ids, batch.positions, batch.slots, batch.row_sequences, batch.prefix_lengths]
        parts = [part.to(torch.int32).flatten() for part in (*narrow, batch.block_tables, self.rows)]
        return torch.cat([*parts, batch.masks.flatten().view(torch.int32)])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> StepPlan:
        numbers = packed.numpy()
        rows, words, sequences, blocks, wanted = (int(size) for size in numbers[1:_SIZES])
        sizes = [*[rows] * 5, sequences * blocks, wanted, 2 * rows * words]
        ends = accumulate(sizes, initial=_SIZES)
        parts = [numbers[start:stop] for start, stop in pairwise(ends)]
        wide = [torch.from_numpy(part.astype(np.int64)) for part in parts[:3]]
        narrow = [torch.from_numpy(part.copy()) for part in parts[3:6]]
        return cls(
            batch=FlatBatch(
                token_ids=wide[0],
                positions=wide[1],
                slots=wide[2],
                row_sequences=narrow[0],
                prefix_lengths=narrow[1],
                masks=torch.from_numpy(parts[7].copy()).view(torch.int64).view(rows, words),
                block_tables=narrow[2].view(sequences, blocks),
            ),
            rows=torch.from_numpy(parts[6].astype(np.int64)),
        )


@dataclass(frozen=True)
class AcceptedPaths:
    """The nodes of a step's trees that are kept. moves: int64 [2, moves], the slots that their KV leaves and takes."""

    moves: torch.Tensor

    def pack(self) -> torch.Tensor:
        """int32 on the CPU."""
        return torch.cat([torch.tensor([_PATHS], dtype=torch.int32), self.moves.to(torch.int32).flatten()])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> AcceptedPaths:
        return cls(packed[1:].view(2, -1).long())


def unpack(packed: torch.Tensor) -> StepPlan | AcceptedPaths:
    return StepPlan.unpack(packed) if packed[0] == _PLAN else AcceptedPaths.unpack(packed)
