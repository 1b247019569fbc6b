"""Trees and sampling parameters on the wire, for the services that compute with them; never for the gateway."""

from __future__ import annotations

import torch

from protos import tree_pb2
from speculation.sampling import SamplingParams
from speculation.tree import InvalidTree, TokenTree


def tree_to_wire(tree: TokenTree) -> tree_pb2.TokenTree:
    message = tree_pb2.TokenTree(
        token_ids=tree.token_ids, parents=tree.parents, source=tree.source, confidences=tree.confidences
    )
    if tree.distributions:
        message.sampled_nodes.extend(tree.distributions)
        rows = torch.stack(list(tree.distributions.values()))
        message.distributions = rows.to(torch.float32).cpu().numpy().astype("<f4").tobytes()
    return message


def tree_from_wire(message: tree_pb2.TokenTree, vocab_size: int) -> TokenTree:
    """Rebuild and validate a tree.

    Raises:
        InvalidTree: it breaks an invariant, or its tokens or distributions do not fit the vocabulary.
    """
    nodes = list(message.sampled_nodes)
    if len(message.distributions) != 4 * vocab_size * len(nodes):
        raise InvalidTree(
            f"{len(message.distributions)} bytes of distributions; {len(nodes)} nodes need 4 * {vocab_size} each"
        )
    distributions: dict[int, torch.Tensor] = {}
    if nodes:
        rows = torch.frombuffer(bytearray(message.distributions), dtype=torch.float32).view(len(nodes), vocab_size)
        if not (torch.isfinite(rows).all() and (rows >= 0).all() and (rows.sum(1) - 1).abs().max() < 1e-3):
            raise InvalidTree("a distribution has negative or non-finite entries or does not sum to 1")
        distributions = dict(zip(nodes, rows.unbind(), strict=True))
    tree = TokenTree(
        tuple(message.token_ids), tuple(message.parents), distributions, message.source, tuple(message.confidences)
    )
    tree.check_vocabulary(vocab_size)
    return tree


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
