"""Trees of one small model, all levels of all sequences in one native call."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernels.draft_loop.native import ChildRule, DraftSequence, TreeBounds
from runtime.kv_cache import KVCache
from runtime.transformer import Transformer
from services.speculator.session import DrafterSettings, DraftOrder, Session
from speculation.calibration import Calibration
from speculation.children import ChildSelection
from speculation.expansion import Slots
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree


def grow_natively(
    name: str,
    model: Transformer,
    cache: KVCache,
    settings: DrafterSettings,
    growing: Sequence[tuple[Session, DraftOrder, ChildRule]],
) -> list[TokenTree]:
    """The trees, in the order given; the sessions know afterwards what was evaluated.

    name: becomes the trees' source. Each session's uncomputed tokens go into one forward pass.
    """
    grown = model.grow_trees(cache, [_sequence(session, order, rule, settings) for session, order, rule in growing])
    trees: list[TokenTree] = []
    for (session, _, _), tree in zip(growing, grown, strict=True):
        session.cache.length = len(session.tokens) - 1  # the root's entry is the first of the tree's
        session.slots = Slots(tree.slot_tokens, tree.slot_parents)
        trees.append(
            TokenTree.of_sound_parts(tuple(tree.token_ids), tuple(tree.parents), {}, name, tuple(tree.confidences))
        )
    return trees


def child_rule(params: SamplingParams, selection: ChildSelection, calibration: Calibration) -> ChildRule | None:
    """The rule by which `rank_children` chooses behind `LogitsPipeline`; None where a ChildRule cannot say it.

    It has no draws without replacement and nothing that depends on the tokens before: bias and penalties.
    """
    if selection is ChildSelection.SAMPLED or params.needs_context or params.logit_bias:
        return None
    noisy = selection is ChildSelection.SHARED_NOISE
    noise_seed = params.seed if noisy else None
    if params.greedy:
        scale = calibration.disagreement if noisy else calibration.greedy_temperature
        return ChildRule(noise_seed=noise_seed, scale=scale)
    scale = calibration.disagreement if noisy else 1.0
    return ChildRule(params.temperature, params.top_k, params.top_p, params.min_p, noise_seed, scale)


def _sequence(session: Session, order: DraftOrder, rule: ChildRule, settings: DrafterSettings) -> DraftSequence:
    widths = order.widths[: order.depth]
    floor = 0.0 if widths else max(settings.min_confidence, order.min_confidence)
    bounds = TreeBounds(
        nodes=order.nodes,
        depth=len(widths) or order.depth,
        beam=settings.beam,
        floor=math.log(floor) if floor > 0 else -math.inf,
        widths=widths,
    )
    cached = session.cache
    return DraftSequence(cached.blocks, cached.length, session.tokens[cached.length :], bounds, rule)
