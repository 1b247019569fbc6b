"""What ranks exchange within a step. Every sum is taken in the order of the ranks.

An all-reduce sums each element in an order that depends on its place in the buffer, so that a row's bits would depend
on how many rows stand beside it. Here each rank gathers the parts of all and adds them itself: for n ranks it receives
n - 1 parts, where a ring's all-reduce receives 2 (n - 1) / n. That is the same for two ranks, twice as much for four.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def ordered_sum(part: torch.Tensor, ranks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """part 0 + part 1 + .. in float32, on every rank, in part's own type."""
    parts = gather_parts(part, ranks, group)
    total = parts[0].float()
    for other in parts[1:]:
        total = total + other
    return total.to(part.dtype)


def gather_parts(part: torch.Tensor, ranks: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The parts of all ranks, which have one shape, in the order of the ranks."""
    parts = list(part.new_empty(ranks, *part.shape).unbind())
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def gather_columns(part: torch.Tensor, width: int, ranks: int, group: dist.ProcessGroup) -> torch.Tensor | None:
    """part [rows, columns of this rank] -> [rows, columns of all] on the group's first rank, None on the others.

    width: columns of every rank but those at the end, which may have fewer.
    """
    rows, columns = part.shape
    if columns < width:
        part = torch.nn.functional.pad(part, (0, width - columns))
    is_first = dist.get_rank(group) == 0
    parts = list(part.new_empty(ranks, rows, width).unbind()) if is_first else None
    dist.gather(part.contiguous(), parts, group=group, group_dst=0)
    return None if parts is None else torch.cat(parts, dim=1)
