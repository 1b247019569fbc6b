"""Trees and sampling parameters on the wire, for the services that compute with them; never for the gateway."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress

import torch

from protos import tree_pb2
from speculation.sampling import SamplingParams
from speculation.tree import InvalidTree, TokenTree, are_sound


def trees_to_wire(trees: Sequence[TokenTree]) -> tree_pb2.TokenTrees:
    message = tree_pb2.TokenTrees(
        sizes=[len(tree.token_ids) for tree in trees],
        sources=[tree.source for tree in trees],
        token_ids=chain.from_iterable([tree.token_ids for tree in trees]),
        parents=chain.from_iterable([tree.parents for tree in trees]),
        estimated=[bool(tree.confidences) for tree in trees],
        confidences=chain.from_iterable([tree.confidences for tree in trees]),
    )
    if any(tree.distributions for tree in trees):
        rows: list[torch.Tensor] = []
        start = 0
        for tree in trees:
            nodes = sorted(tree.distributions)
            message.sampled_nodes.extend([start + node for node in nodes])
            rows += [tree.distributions[node] for node in nodes]
            start += len(tree)
        message.distributions = torch.stack(rows).to(torch.float32).cpu().numpy().astype("<f4").tobytes()
    return message


def trees_from_wire(message: tree_pb2.TokenTrees, vocab_size: int) -> list[TokenTree]:
    """Rebuild and validate trees.

    Raises:
        InvalidTree: columns do not fit each other, a tree breaks an invariant, or its tokens or distributions do not
            fit the vocabulary.
    """
    sizes, token_ids, parents = message.sizes, tuple(message.token_ids), tuple(message.parents)
    confidences, estimated = tuple(message.confidences), message.estimated
    if not len(sizes) == len(message.sources) == len(estimated):
        raise InvalidTree(f"{len(sizes)} sizes, {len(message.sources)} sources and {len(estimated)} marks of estimates")
    if not sum(sizes) == len(token_ids) == len(parents):
        raise InvalidTree(f"{len(token_ids)} tokens and {len(parents)} parents for trees of {sum(sizes)} nodes")
    if len(confidences) != (wanted := sum(compress(sizes, estimated))):
        raise InvalidTree(f"{len(confidences)} confidences for {wanted} nodes")
    distributions = _distributions(message, vocab_size) if message.sampled_nodes or message.distributions else {}
    in_vocabulary = max(token_ids, default=0) < vocab_size
    sound = in_vocabulary and not distributions and are_sound(sizes, token_ids, parents, confidences)
    make = TokenTree.of_sound_parts if sound else TokenTree
    trees: list[TokenTree] = []
    node = confidence = 0
    for size, source, has_confidences in zip(sizes, message.sources, estimated, strict=True):
        end, confidences_end = node + size, confidence + size * has_confidences
        places = range(node, end) if distributions else ()
        own = {place - node: distributions[place] for place in places if place in distributions}
        trees.append(make(token_ids[node:end], parents[node:end], own, source, confidences[confidence:confidences_end]))
        node, confidence = end, confidences_end
    if not sound:
        for tree in trees:
            tree.check_vocabulary(vocab_size)
    return trees


def _distributions(message: tree_pb2.TokenTrees, vocab_size: int) -> dict[int, torch.Tensor]:
    """By the place of their node among the nodes of all trees."""
    nodes = list(message.sampled_nodes)
    if len(message.distributions) != 4 * vocab_size * len(nodes):
        raise InvalidTree(
            f"{len(message.distributions)} bytes of distributions; {len(nodes)} nodes need 4 * {vocab_size} each"
        )
    if len(set(nodes)) < len(nodes) or max(nodes) >= len(message.token_ids):
        raise InvalidTree(f"sampled nodes {nodes[:4]}.. of {len(message.token_ids)} nodes; each must be one, once")
    rows = torch.frombuffer(bytearray(message.distributions), dtype=torch.float32).view(len(nodes), vocab_size)
    if not (torch.isfinite(rows).all() and (rows >= 0).all() and (rows.sum(1) - 1).abs().max() < 1e-3):
        raise InvalidTree("a distribution has negative or non-finite entries or does not sum to 1")
    return dict(zip(nodes, rows.unbind(), strict=True))


def sampling_to_wire(params: SamplingParams) -> tree_pb2.SamplingParams:
    return tree_pb2.SamplingParams(
        logit_bias=dict(params.logit_bias),
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
    )


def sampling_from_wire(message: tree_pb2.SamplingParams) -> SamplingParams:
    """Rebuild and validate sampling parameters; ValueError names a field out of bounds."""
    return SamplingParams(
        logit_bias=dict(message.logit_bias),
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
    )
