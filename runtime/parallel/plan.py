"""What rank 0 tells the others of a step: one vector of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from runtime.batch import FlatBatch

_SIZES = 6  # numbers that say how long the parts behind them are


@dataclass(frozen=True)
class StepPlan:
    """One forward pass, and the KV moves that come before it: those of the paths that the step before accepted.

    rows: int64 [wanted], rows of the batch whose logits are wanted. moves: int64 [2, moves], slots from and to.
    """

    batch: FlatBatch
    rows: torch.Tensor
    moves: torch.Tensor

    def to(self, device: torch.device) -> StepPlan:
        return StepPlan(self.batch.to(device), self.rows.to(device), self.moves.to(device))

    def pack(self) -> torch.Tensor:
        """int32 on the CPU; token ids, positions and slots are below 2³¹."""
        batch = self.batch
        (rows, words), (sequences, blocks) = batch.masks.shape, batch.block_tables.shape
        sizes = torch.tensor([rows, words, sequences, blocks, len(self.rows), self.moves.shape[1]])
        narrow = [sizes, batch.token_ids, batch.positions, batch.slots, batch.row_sequences, batch.prefix_lengths]
        parts = [part.to(torch.int32).flatten() for part in (*narrow, batch.block_tables, self.rows, self.moves)]
        return torch.cat([*parts, batch.masks.flatten().view(torch.int32)])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> StepPlan:
        numbers = packed.numpy()
        rows, words, sequences, blocks, wanted, moves = (int(size) for size in numbers[:_SIZES])
        sizes = [*[rows] * 5, sequences * blocks, wanted, 2 * moves, 2 * rows * words]
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
                masks=torch.from_numpy(parts[8].copy()).view(torch.int64).view(rows, words),
                block_tables=narrow[2].view(sequences, blocks),
            ),
            rows=torch.from_numpy(parts[6].astype(np.int64)),
            moves=torch.from_numpy(parts[7].astype(np.int64)).view(2, moves),
        )
