"""Trees of one small model, all levels of all sequences in one CUDA graph: one copy to the device, one back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from kernels.draft_loop.native import ChildRule
from kernels.tree_growth.levels import CachePlaces, GrowLevel, TreeRules, Trees
from runtime.batch import FlatBatch
from runtime.kv_cache import BLOCK_SIZE, KVCache, longest_sequence_blocks
from runtime.step_graph import MASK_WORDS, MAX_ROWS, MIN_BLOCKS, Capture, Compute, StepComputer, power_of_four
from services.speculator.session import DrafterSettings, DraftOrder, Session
from speculation.batch_growth import BatchGrowth, Frontier, GrowthRules
from speculation.expansion import Slots
from speculation.logits import SMALLEST_TEMPERATURE
from speculation.noise import gumbel_keys
from speculation.tree import MAX_NODES, TokenTree

LEAST_NODES = 4  # of a captured growth
# Captured before anybody asks: what budgets order.
PREPARED_NODES, PREPARED_LEVELS = (4, 16, 64), (1, 2, 4, 8)

Growing = tuple[Session, DraftOrder, ChildRule]


@dataclass(frozen=True)
class GrowthShape:
    """Sizes of a growth's buffers. nodes: of a tree, depth: levels of it. noisy: whether any scores have noise."""

    sequences: int
    blocks: int
    nodes: int
    depth: int
    noisy: bool


class GrowthGraphs:
    """The growths of one model on one cache. A shape is captured when it first occurs. One thread owns it."""

    def __init__(self, model: StepComputer, cache: KVCache, settings: DrafterSettings, capture: Capture) -> None:
        self._model = model
        self._cache = cache
        self._beam = settings.beam
        self._floor = settings.min_confidence
        self._capture = capture
        self._most_blocks = longest_sequence_blocks(model.config)
        self._growths: dict[GrowthShape, tuple[_StaticGrowth, Compute]] = {}

    def takes(self, order: DraftOrder, rule: ChildRule) -> bool:
        """Whether such a tree can be grown here: no static shape, no filter of the distribution, and masks that fit."""
        filtered = rule.top_k > 0 or rule.top_p < 1 or rule.min_p > 0
        grows = order.nodes > 0 and order.depth > 0
        return grows and not order.widths and not filtered and self._masks_fit(_levels(order.depth))

    def parts(self, growing: Sequence[Growing]) -> list[Sequence[Growing]]:
        """As many at a time as a step has rows for."""
        most = MAX_ROWS // self._beam
        return [growing[start : start + most] for start in range(0, len(growing), most)]

    @torch.inference_mode()
    def prepare(self, sequences: int) -> int:
        """Capture the usual growths of up to `sequences` sequences behind short contexts; how many shapes that are."""
        blocks = min(MIN_BLOCKS, self._most_blocks)
        counts = {power_of_four(count, 1) for count in range(1, min(sequences, MAX_ROWS // self._beam) + 1)}
        depths = [levels for levels in PREPARED_LEVELS if self._masks_fit(levels)]
        for count, nodes, levels, noisy in product(counts, PREPARED_NODES, depths, (False, True)):
            self._growth_of(GrowthShape(count, blocks, nodes, levels, noisy))
        return len(self._growths)

    @torch.inference_mode()
    def grow(self, name: str, growing: Sequence[Growing], root_logits: torch.Tensor) -> list[TokenTree]:
        """The trees, in the order given; the sessions know afterwards what was evaluated.

        name: becomes the trees' source. root_logits: float32 [len(growing), vocab], on the model's device. The cache of
        each session ends before its last token, the root, whose key and value are there, and has blocks for the draft.
        """
        static, compute = self._growth_of(self._shape_of(growing))
        static.fill(growing, self._floor, root_logits)
        compute()
        return static.trees(name, growing)

    def _masks_fit(self, levels: int) -> bool:
        return _words(self._beam, levels) is not None

    def _shape_of(self, growing: Sequence[Growing]) -> GrowthShape:
        blocks = max(len(session.cache.blocks) for session, _, _ in growing)
        return GrowthShape(
            power_of_four(len(growing), 1),
            max(blocks, min(power_of_four(blocks, MIN_BLOCKS), self._most_blocks)),
            min(power_of_four(max(order.nodes for _, order, _ in growing), LEAST_NODES), MAX_NODES - 1),
            _levels(max(order.depth for _, order, _ in growing)),
            any(rule.noise_seed is not None for _, _, rule in growing),
        )

    def _growth_of(self, shape: GrowthShape) -> tuple[_StaticGrowth, Compute]:
        if shape not in self._growths:
            static = _StaticGrowth(shape, self._beam, self._model, self._cache)
            self._growths[shape] = static, self._capture(static.compute)
        return self._growths[shape]


class _StaticGrowth:
    """Buffers that stay where they are, padded to a shape, and what is computed from them.

    Sequences that only pad have no tree: their rows see nothing and write to the scratch slot.
    """

    def __init__(self, shape: GrowthShape, beam: int, model: StepComputer, cache: KVCache) -> None:
        self._shape = shape
        self._beam = min(beam, shape.nodes)
        self._model = model
        self._cache = cache
        words = _words(self._beam, shape.depth)
        assert words is not None, "ask takes first"
        self._words = words
        device, cuda = model.device, model.device.type == "cuda"
        count = shape.sequences
        numbers = count * (4 + shape.depth) + 3 * count + (count * shape.blocks + 1) // 2
        self._host = torch.zeros(numbers, dtype=torch.int64, pin_memory=cuda)
        self._device = torch.zeros(numbers, dtype=torch.int64, device=device)
        given = _Given.of(self._host, shape)
        given.real[1:].fill_(1)  # temperatures and scales of what pads
        self._given = given.whole.numpy(), given.noise_keys.numpy(), given.real.numpy(), given.tables.numpy()
        self._device.copy_(self._host)
        self._input = _Given.of(self._device, shape)
        self._root_logits = torch.zeros(count, model.config.vocab_size, device=device)
        self._row_sequences = torch.arange(count, dtype=torch.int32, device=device).repeat_interleave(self._beam)
        self._rules = self._input.rules(self._beam, shape.noisy)
        self._places = CachePlaces(self._input.whole[0], self._input.tables, BLOCK_SIZE, cache.scratch_slot)
        self._roots = Trees.roots(count, shape.nodes, words, device)
        self._result = torch.zeros(4, count, shape.nodes, dtype=torch.int64, device=device)

    def fill(self, growing: Sequence[Growing], floor: float, root_logits: torch.Tensor) -> None:
        """Copy what is wanted to the device, in the order of its stream. The last results have been read."""
        whole, keys, real, tables = self._given
        count = len(growing)
        whole.fill(0)  # what pads has no tree
        sessions, orders, rules = zip(*growing, strict=True)
        whole[:, :count] = [
            [len(session.tokens) - 1 for session in sessions],
            [order.nodes for order in orders],
            [order.depth for order in orders],
            [rule.noise_seed is not None for rule in rules],
        ]
        least = [max(floor, order.min_confidence) for order in orders]
        real[:, :count] = [
            [math.log(value) if value > 0 else -math.inf for value in least],
            [max(rule.temperature, SMALLEST_TEMPERATURE) for rule in rules],
            [rule.scale for rule in rules],
        ]
        keys[:count] = [self._keys(session, rule) for session, _, rule in growing]
        for row, session in enumerate(sessions):
            tables[row, : len(session.cache.blocks)] = session.cache.blocks
        self._device.copy_(self._host, non_blocking=True)
        self._root_logits[:count].copy_(root_logits)

    def _keys(self, session: Session, rule: ChildRule) -> list[int]:
        """Of the positions behind the root."""
        if rule.noise_seed is None:
            return [0] * self._shape.depth
        return gumbel_keys(rule.noise_seed, range(len(session.tokens), len(session.tokens) + self._shape.depth))

    def compute(self) -> None:
        """All levels; what is read is on the device before."""
        grow_level = self._model.backend.grow_level
        grown = self._grown_in_torch() if grow_level is None else self._grown(grow_level)
        numbers = (grown.token_ids, grown.parents, grown.slots, grown.confidences.view(torch.int64))
        torch.stack(numbers, out=self._result)

    def _grown(self, grow_level: GrowLevel) -> Trees:
        trees = grow_level(self._root_logits[:, None], self._rules, self._places, self._roots)
        for _ in range(1, self._shape.depth):
            rows = trees.frontier
            logits = self._logits(
                rows.token_ids, rows.positions, rows.cache_slots, rows.prefix_lengths, rows.masks.flatten(0, 1)
            )
            trees = grow_level(logits, self._rules, self._places, trees)
        return trees

    def _grown_in_torch(self) -> BatchGrowth:
        rules = self._rules
        noisy = None if rules.noisy is None else rules.noisy > 0
        own = GrowthRules(
            rules.nodes, rules.depth, rules.floor, rules.temperature.float(), rules.scale, rules.noise_keys, noisy
        )
        growth = BatchGrowth(own, self._shape.nodes, self._beam, self._words)
        growth.extend(self._root_logits[:, None])
        for level in range(1, self._shape.depth):
            growth.extend(self._logits(*self._rows(growth.frontier, level)))
        return growth

    def _rows(self, frontier: Frontier, level: int) -> tuple[torch.Tensor, ...]:
        """Token ids, positions, slots in the cache, prefix lengths and masks, as `FrontierRows` has them."""
        active, lengths = frontier.active, self._places.lengths[:, None]
        entries = lengths + frontier.slots
        blocks = self._places.block_tables.gather(1, (entries // BLOCK_SIZE).clamp(0, self._shape.blocks - 1))
        slots = torch.where(active, blocks * BLOCK_SIZE + entries % BLOCK_SIZE, self._places.scratch_slot)
        return (
            torch.where(active, frontier.token_ids, 0).flatten(),
            torch.where(active, lengths + level, 0).flatten(),
            slots.flatten(),
            torch.where(active, lengths, 0).int().flatten(),
            frontier.masks.masked_fill(~active[:, :, None], 0).flatten(0, 1),
        )

    def _logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prefix_lengths: torch.Tensor,
        masks: torch.Tensor,
    ) -> torch.Tensor:
        """float32 [sequences, beam, vocab] behind the rows of a frontier."""
        batch = FlatBatch(
            token_ids, positions, slots, self._row_sequences, prefix_lengths, masks, self._places.block_tables
        )
        logits = self._model.logits(self._model.forward(batch, self._cache))
        return logits.view(self._shape.sequences, self._beam, -1)

    def trees(self, name: str, growing: Sequence[Growing]) -> list[TokenTree]:
        """Wait for the results, copy them here and read them."""
        token_ids, parents, slots, confidences = self._result[:, : len(growing)].cpu()
        rows = zip(
            growing,
            token_ids.tolist(),
            parents.tolist(),
            slots.tolist(),
            confidences.view(torch.float64).tolist(),
            strict=True,
        )
        return [_tree(name, session, *row) for (session, _, _), *row in rows]


def _levels(depth: int) -> int:
    """Captured for trees of such a depth: rows that see nothing cost less than a capture for each depth."""
    return 1 << (depth - 1).bit_length()


def _words(beam: int, levels: int) -> int | None:
    """Words of a mask with a bit for each slot; None where the kernels have none so long."""
    return next((size for size in MASK_WORDS if 1 + beam * levels <= 64 * size), None)


@dataclass(frozen=True)
class _Given:
    """Views of one int64 buffer.

    whole: int64 [4, sequences], entries before the root, most nodes, most depth, whether there is noise.
    noise_keys: int64 [sequences, depth]. real: float64 [3, sequences], floor, temperature, scale.
    tables: int32 [sequences, blocks]; what stands behind a sequence's own blocks means nothing.
    """

    whole: torch.Tensor
    noise_keys: torch.Tensor
    real: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def of(cls, buffer: torch.Tensor, shape: GrowthShape) -> _Given:
        count = shape.sequences
        sizes = [4 * count, shape.depth * count, 3 * count]
        whole, keys, real, tables = buffer.split([*sizes, len(buffer) - sum(sizes)])
        return cls(
            whole.view(4, count),
            keys.view(count, shape.depth),
            real.view(torch.float64).view(3, count),
            tables.view(torch.int32)[: count * shape.blocks].view(count, shape.blocks),
        )

    def rules(self, beam: int, noisy: bool) -> TreeRules:
        """What is wanted, in these views."""
        _, nodes, depth, has_noise = self.whole
        floor, temperature, scale = self.real
        keys, has_noise = (self.noise_keys, has_noise) if noisy else (None, None)
        return TreeRules(nodes, depth, floor, temperature, scale, keys, has_noise, beam)


def _tree(
    name: str,
    session: Session,
    token_ids: Sequence[int],
    parents: Sequence[int],
    slots: Sequence[int],
    confidences: Sequence[float],
) -> TokenTree:
    """token_ids, parents, slots, confidences: as in Trees."""
    count = sum(confidence > -math.inf for confidence in confidences)
    node_of = {0: 0} | {slot: node for node, slot in enumerate(slots[:count], start=1) if slot >= 0}
    last = max(node_of)
    slot_tokens, slot_parents = [-1] * (last + 1), [-2] * (last + 1)  # nothing stands where no node has the slot
    slot_tokens[0], slot_parents[0] = session.tokens[-1], -1
    for slot, node in node_of.items():
        if node:
            slot_tokens[slot], slot_parents[slot] = token_ids[node - 1], parents[node - 1]
    session.slots = Slots(slot_tokens, slot_parents)
    return TokenTree(
        (session.tokens[-1], *token_ids[:count]),
        (-1, *[node_of[parent] for parent in parents[:count]]),
        source=name,
        confidences=(0.0, *confidences[:count]),
    ).depth_first()
