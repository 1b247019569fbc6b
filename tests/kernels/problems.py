"""Attention problems of every shape, and the slow, obvious answer to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention problem; `trees` holds (prefix length, nodes) of each sequence, nodes 0 for a prompt."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    trees: tuple[tuple[int, int], ...]
    words: int = 1
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of tree attention. Slots that no row sees hold NaN, unused table entries an impossible block."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    row_sequences: torch.Tensor
    prefix_lengths: torch.Tensor
    masks: torch.Tensor
    scale: float

    def arguments(
        self,
    ) -> tuple[
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        int,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        float,
    ]:
        return (
            self.query,
            self.keys,
            self.values,
            self.block_tables,
            self.block_size,
            self.row_sequences,
            self.prefix_lengths,
            self.masks,
            self.scale,
        )

    def to(self, device: str) -> Problem:
        moved = [item.to(device) if isinstance(item, torch.Tensor) else item for item in self.arguments()]
        return Problem(*moved)  # type: ignore[arg-type]  # a list has lost the types of its places


def signed(mask: int) -> int:
    """A uint64's bits as int64."""
    return mask - 2**64 if mask >= 2**63 else mask


def mask_words(mask: int, words: int) -> list[int]:
    return [signed(mask >> 64 * word & 2**64 - 1) for word in range(words)]


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    return [-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, nodes)]


def ancestor_masks(parents: list[int]) -> list[int]:
    masks = [1]
    for node in range(1, len(parents)):
        masks.append(masks[parents[node]] | 1 << node)
    return masks


def make_problem(shape: Shape, seed: int = 0) -> Problem:
    """A prefix and a random tree for every sequence; a sequence of 0 nodes is a prompt of `prefix` causal rows."""
    generator = torch.Generator().manual_seed(seed)
    row_sequences, prefixes, masks = [], [], []
    for sequence, (prefix, nodes) in enumerate(shape.trees):
        rows = nodes or prefix
        row_sequences += [sequence] * rows
        prefixes += [prefix] * nodes if nodes else list(range(1, prefix + 1))
        tree = ancestor_masks(random_parents(nodes, generator)) if nodes else [0] * rows
        masks += [mask_words(mask, shape.words) for mask in tree]
    block_size = shape.block_size
    blocks = [-(-(prefix + nodes) // block_size) for prefix, nodes in shape.trees]
    # one block more than is needed, so that a read past the end finds NaN
    order = torch.randperm(sum(blocks) + 1, generator=generator).tolist()
    tables = torch.full((len(blocks), max(blocks) + 1), 2**30, dtype=torch.int32)
    cache = torch.full((2, len(order) * block_size, shape.kv_heads, shape.head_dim), float("nan"))
    for sequence, ((prefix, nodes), count) in enumerate(zip(shape.trees, blocks, strict=True)):
        own = [order.pop() for _ in range(count)]
        tables[sequence, :count] = torch.tensor(own, dtype=torch.int32)
        slots = [own[entry // block_size] * block_size + entry % block_size for entry in range(prefix + nodes)]
        cache[:, slots] = torch.randn((2, len(slots), shape.kv_heads, shape.head_dim), generator=generator)
    query = torch.randn((len(prefixes), shape.heads, shape.head_dim), generator=generator)
    return Problem(
        query=query.to(shape.dtype),
        keys=cache[0].to(shape.dtype),
        values=cache[1].to(shape.dtype),
        block_tables=tables,
        block_size=block_size,
        row_sequences=torch.tensor(row_sequences, dtype=torch.int32),
        prefix_lengths=torch.tensor(prefixes, dtype=torch.int32),
        masks=torch.tensor(masks, dtype=torch.int64),
        scale=shape.head_dim**-0.5,
    )


def visible_slots(problem: Problem, row: int) -> list[int]:
    """Slots that a row sees, in logical order."""
    prefix = int(problem.prefix_lengths[row])
    entries = list(range(prefix))
    for word, bits in enumerate(problem.masks[row].tolist()):
        entries += [prefix + 64 * word + bit for bit in range(64) if bits >> bit & 1]
    table = problem.block_tables[int(problem.row_sequences[row])].tolist()
    return [table[entry // problem.block_size] * problem.block_size + entry % problem.block_size for entry in entries]


def obvious_attention(problem: Problem) -> torch.Tensor:
    """One row, one head, one key at a time, in float64."""
    rows, heads, _ = problem.query.shape
    group = heads // problem.keys.shape[1]
    output = torch.zeros(problem.query.shape, dtype=torch.float64)
    for row in range(rows):
        slots = visible_slots(problem, row)
        for head in range(heads if slots else 0):
            keys, values = (kv[slots, head // group].double() for kv in (problem.keys, problem.values))
            weights = torch.softmax(keys @ problem.query[row, head].double() * problem.scale, dim=0)
            output[row, head] = weights @ values
    return output
