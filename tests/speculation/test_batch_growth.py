"""Trees grown together in tensors against those of the builder, on distributions that follow from the path alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from speculation.batch_growth import BatchGrowth, GrowthRules
from speculation.children import ChildPolicy, ChildSelection
from speculation.expansion import BestFirstExpansion
from speculation.noise import gumbel_keys

VOCAB, LEVELS, POSITION = 30, 6, 11
Path = tuple[int, ...]
# Most nodes, most levels, least probability, temperature, scale, seed of the noise if any.
Wish = tuple[int, int, float, float, float, int | None]


def logits_behind(tree: int, path: Path) -> torch.Tensor:
    chance = random.Random(f"{tree} {path}")
    return torch.tensor([chance.gauss(0, 2) for _ in range(VOCAB)])


def grown_alone(tree: int, wish: Wish, beam: int) -> dict[Path, float]:
    """Confidences by path."""
    nodes, depth, floor, temperature, scale, seed = wish
    selection = ChildSelection.TOP if seed is None else ChildSelection.SHARED_NOISE
    policy = ChildPolicy(selection, seed or 0, temperature=scale, disagreement=scale)
    builder = BestFirstExpansion(1, POSITION, policy, max_nodes=nodes, max_depth=depth, beam=beam, min_confidence=floor)
    while frontier := builder.frontier():
        rows = torch.stack([logits_behind(tree, builder.path_tokens(node)) for node in frontier])
        builder.extend((rows / temperature).log_softmax(-1))
    built = builder.build()
    return {
        tuple(built.token_ids[step] for step in built.path(node)): built.confidences[node]
        for node in range(1, len(built))
    }


def grown_together(wishes: list[Wish], beam: int, most_nodes: int, words: int) -> list[dict[Path, float]]:
    nodes, depth, floor, temperature, scale, seeds = zip(*wishes, strict=True)
    rules = GrowthRules(
        torch.tensor(nodes),
        torch.tensor(depth),
        torch.tensor([math.log(value) if value else -math.inf for value in floor], dtype=torch.float64),
        torch.tensor(temperature),
        torch.tensor(scale, dtype=torch.float64),
        torch.tensor([gumbel_keys(seed or 0, range(POSITION, POSITION + LEVELS)) for seed in seeds]),
        torch.tensor([seed is not None for seed in seeds]),
    )
    growth = BatchGrowth(rules, most_nodes, beam, words)
    paths: list[dict[int, Path]] = [{0: ()} for _ in wishes]
    growth.extend(torch.stack([logits_behind(tree, ())[None] for tree in range(len(wishes))]))
    for _ in range(LEVELS - 1):
        frontier = growth.frontier
        logits = torch.zeros(*frontier.slots.shape, VOCAB)
        for tree, place in frontier.active.nonzero().tolist():
            slot = int(frontier.slots[tree, place])
            node = growth.slots[tree].tolist().index(slot)
            above = int(growth.parents[tree, node])
            assert int(frontier.token_ids[tree, place]) == int(growth.token_ids[tree, node])
            paths[tree][slot] = (*paths[tree][above], int(growth.token_ids[tree, node]))
            logits[tree, place] = logits_behind(tree, paths[tree][slot])
            seen = {number for number, path in paths[tree].items() if paths[tree][slot][: len(path)] == path}
            assert bits(frontier.masks[tree, place]) == seen
        growth.extend(logits)
    assert not growth.frontier.active.any()
    return [
        {
            (*paths[tree][parent], token): confidence
            for parent, token, confidence in zip(
                growth.parents[tree].tolist(),
                growth.token_ids[tree].tolist(),
                growth.confidences[tree].tolist(),
                strict=True,
            )
            if confidence > -math.inf
        }
        for tree in range(len(wishes))
    ]


def bits(words: torch.Tensor) -> set[int]:
    return {64 * word + bit for word, value in enumerate(words.tolist()) for bit in range(64) if value >> bit & 1}


@pytest.mark.parametrize(("beam", "most_nodes", "words"), [(1, 20, 1), (4, 16, 1), (20, 64, 4)])
def test_trees_equal_those_of_the_builder(beam: int, most_nodes: int, words: int) -> None:
    wishes: list[Wish] = [
        (most_nodes, LEVELS, 0.0, 1.0, 1.0, None),
        (5, 3, 0.01, 0.5, 2.0, None),
        (most_nodes - 3, LEVELS, 0.02, 1.3, 0.4, 7),
        (1, 1, 0.0, 1.0, 0.7, 2**64 - 1),
        (0, LEVELS, 0.0, 1.0, 1.0, None),
        (7, 0, 0.0, 1.0, 1.0, None),
    ]
    together = grown_together(wishes, beam, most_nodes, words)
    for tree, wish in enumerate(wishes):
        alone = grown_alone(tree, wish, beam)
        assert together[tree].keys() == alone.keys()
        assert [together[tree][path] for path in alone] == pytest.approx(list(alone.values()), abs=1e-5)
    assert [len(tree) for tree in together[:2]] == [most_nodes, 5]
    assert together[4] == together[5] == {}
