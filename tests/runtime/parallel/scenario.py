"""Steps that a model takes alike in one process and in a group.

Chains together and alone, a tree, long chains, greedy decoding, draws, and a path whose acceptance no step follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.token_draw.native import draw_tokens
from runtime.batch import Segment
from runtime.kv_cache import CachedSequence, KVCache, slot
from runtime.step_model import StepModel
from speculation.tree import TokenTree

VOCAB = 319  # divides by neither 2 nor 4
BLOCKS = 64
CHAINS = (37, 5, 1, 20)
COMMITTED = 14  # the tree crosses a block boundary
TREE = TokenTree((5, 6, 7, 8, 9, 10, 6), (-1, 0, 0, 2, 3, 3, 1))
ACCEPTED = (2, 3, 4)
GREEDY_TOKENS = 24
TOKENS = ("greedy", "drawn")
LONG = (200, 150)  # chains whose plan is longer than the first broadcast of an order


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def play(model: StepModel, cache: KVCache) -> dict[str, torch.Tensor]:
    """Logits by name, float32; those of TOKENS hold token ids."""
    results = {"together": _chains(model, cache, [CHAINS])}
    results["alone"] = _chains(model, cache, [(length,) for length in CHAINS])
    results["tree"], results["following"] = _tree(model, cache)
    results["long"] = _chains(model, cache, [LONG, LONG])
    results["nothing wanted"] = _nothing_wanted(model, cache)
    results["greedy"] = torch.tensor(_greedy(model, cache, prompt(9)))
    results["drawn"] = torch.tensor(_draw(model, cache, prompt(9)))
    results["kept"] = _keep(model, cache)
    return {name: result.cpu().clone() for name, result in results.items()}


def _chains(model: StepModel, cache: KVCache, batches: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits of all rows, in the order of the chains; each batch is a step."""
    rows = []
    for lengths in batches:
        sequences = [CachedSequence() for _ in lengths]
        segments = []
        for sequence, length in zip(sequences, lengths, strict=True):
            cache.reserve(sequence, length)
            segments.append(Segment.chain(sequence, prompt(length, length), 0))
        rows.append(model.step(segments, range(sum(lengths)), cache).clone())
        for sequence in sequences:
            cache.release(sequence)
    return torch.cat(rows)


def _tree(model: StepModel, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a tree's nodes, and of a token behind its accepted path; rows in another order than the batch's."""
    sequence = CachedSequence()
    cache.reserve(sequence, 64)
    prefix = Segment.chain(sequence, prompt(COMMITTED), 0)
    nodes = Segment.tree(sequence, TREE.token_ids, TREE.depths(), TREE.ancestor_masks(), COMMITTED)
    rows = [*range(COMMITTED, COMMITTED + len(TREE)), 3, 0]
    logits = model.step([prefix, nodes], rows, cache).clone()  # the next step may overwrite it
    sources = [slot(sequence, COMMITTED + node) for node in ACCEPTED]
    model.compact(cache, sources, [slot(sequence, COMMITTED + depth) for depth in range(1, len(ACCEPTED) + 1)])
    following = Segment.chain(sequence, [11], COMMITTED + 1 + len(ACCEPTED))
    behind = model.step([following], [0], cache)
    cache.release(sequence)
    return logits, behind


def _keep(model: StepModel, cache: KVCache) -> torch.Tensor:
    """A chain of which entries are moved; its logits. It is the last that the model is asked for."""
    sequence = CachedSequence()
    cache.reserve(sequence, 20)
    logits = model.step([Segment.chain(sequence, prompt(20), 0)], [19], cache)
    model.compact(cache, [slot(sequence, 3), slot(sequence, 18)], [slot(sequence, 1), slot(sequence, 2)])
    cache.release(sequence)
    return logits


def _nothing_wanted(model: StepModel, cache: KVCache) -> torch.Tensor:
    """A chunk of a prompt, of which no logits are wanted, and then the rest of it."""
    sequence = CachedSequence()
    cache.reserve(sequence, 20)
    tokens = prompt(20)
    empty = model.step([Segment.chain(sequence, tokens[:12], 0)], [], cache)
    assert empty.shape == (0, VOCAB)
    rest = model.step([Segment.chain(sequence, tokens[12:], 12)], [7], cache)
    cache.release(sequence)
    return rest


def _draw(model: StepModel, cache: KVCache, tokens: list[int]) -> list[int]:
    """A token drawn behind each of a chain's."""
    sequence = CachedSequence()
    cache.reserve(sequence, len(tokens))
    rows = range(len(tokens))
    logits = model.step([Segment.chain(sequence, tokens, 0)], rows, cache)
    cache.release(sequence)
    return draw_tokens(logits.cpu(), rows, [0.8] * len(rows), [7] * len(rows), rows)


def _greedy(model: StepModel, cache: KVCache, tokens: list[int]) -> list[int]:
    sequence = CachedSequence()
    cache.reserve(sequence, len(tokens) + GREEDY_TOKENS)
    pending, start = tokens, 0
    generated: list[int] = []
    while len(generated) < GREEDY_TOKENS:
        logits = model.step([Segment.chain(sequence, pending, start)], [len(pending) - 1], cache)
        start += len(pending)
        pending = [int(logits[0].argmax())]
        generated += pending
    cache.release(sequence)
    return generated
