"""One rank of several groups, one after the other: python -m tests.runtime.parallel.rank_program FILE RANK PORT.

FILE is JSON: a list of cases, {"folder", "tensor", "pipeline", "device", "kernels", "dtype", "out"}. Each rank of a
case writes what it holds to `out`.RANK, rank 0 also what the scenario gave, the others which orders they heard.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

from runtime.parallel.group import Group
from runtime.parallel.liveness import GroupFailed
from runtime.parallel.model import LeadingModel, RankModel, follow
from runtime.parallel.orders import AcceptedPaths, StepPlan, unpack
from runtime.parallel.place import Place
from runtime.parallel.sharding import Degrees
from runtime.transformer import LoadOptions
from tests.runtime.parallel.scenario import BLOCKS, play

TIMEOUT_S = 30.0


def main(cases: list[dict[str, Any]], rank: int, port: int) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    for index, case in enumerate(cases):
        degrees = Degrees(case["tensor"], case["pipeline"])
        if rank < degrees.ranks:
            place = Place(rank, degrees.ranks, rank, degrees.ranks, "127.0.0.1", port)
            with Group.join(
                place, PrefixStore(str(index), store), degrees, torch.device(case["device"]), TIMEOUT_S, _fail
            ) as group:
                torch.save(_play_case(case, group), f"{case['out']}.{rank}")


def _play_case(case: dict[str, Any], group: Group) -> dict[str, Any]:
    options = LoadOptions(device=case["device"], dtype=case["dtype"], kernels=case["kernels"])
    before = _memory()
    model = RankModel.load(Path(case["folder"]), options, group)
    weights = _memory() - before
    # The ranks have different memory, and all take the least.
    cache = model.new_cache(0.5, max_sequences=1, blocks=BLOCKS + group.rank)
    result: dict[str, Any] = {
        "weights": weights,
        "cache": cache.data.nbytes,
        "blocks": cache.blocks,
        "layers": list(model.shard.layers),
    }
    if group.rank == 0:
        result["played"] = play(LeadingModel(model, group), cache)
    else:
        orders, broadcasts = _recorded(group)
        follow(model, cache, group)
        result |= {"orders": [type(order).__name__ for order in orders], "broadcasts": len(broadcasts)}
        assert isinstance(orders[-1], AcceptedPaths)
        result["moved"] = cache.data[:, :, orders[-1].moves]
    return result


def _memory() -> int:
    """Bytes that this process has for itself, without the pages of files."""
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _recorded(group: Group) -> tuple[list[StepPlan | AcceptedPaths], list[torch.Size]]:
    """The orders that the group will receive, and the sizes of their broadcasts."""
    orders: list[StepPlan | AcceptedPaths] = []
    broadcasts: list[torch.Size] = []
    receive, broadcast = group.orders.receive, dist.broadcast

    def received() -> torch.Tensor | None:
        dist.broadcast = counted
        packed = receive()
        dist.broadcast = broadcast
        if packed is not None:
            orders.append(unpack(packed))
        return packed

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        broadcasts.append(tensor.shape)
        return broadcast(tensor, *args, **options)

    group.orders.receive = received  # type: ignore[method-assign]  # the real one, with a record
    return orders, broadcasts


def _fail(failure: GroupFailed) -> None:
    print(failure, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]))
