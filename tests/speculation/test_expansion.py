from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.acceptance import AcceptanceRule
from speculation.calibration import Calibration
from speculation.children import ChildPolicy, ChildSelection
from speculation.expansion import BestFirstExpansion, Expansion, StaticExpansion
from speculation.merge import MergedDraft
from speculation.noise import gumbel_noise
from speculation.sampling import SamplingParams
from speculation.tree import MAX_NODES
from tests.speculation.models import grow, markov_model, perturbed, step
from tests.speculation.statistics import ALPHA, chi_square_p_value
from tests.speculation.trees import token_paths

TOP, SHARED_NOISE, SAMPLED = ChildSelection

builders: st.SearchStrategy[Expansion] = st.builds(
    StaticExpansion,
    st.integers(0, 4),
    st.integers(1, 50),
    st.builds(ChildPolicy, st.sampled_from(ChildSelection), st.integers(0, 2**64 - 1), st.integers(0, 2**63)),
    widths=st.lists(st.integers(1, 7), max_size=4),
    max_nodes=st.integers(0, 20),
    min_confidence=st.sampled_from([0.0, 0.05, 0.5]),
) | st.builds(
    BestFirstExpansion,
    st.integers(0, 4),
    st.integers(1, 50),
    st.builds(ChildPolicy, st.sampled_from(ChildSelection), st.integers(0, 2**64 - 1), st.integers(0, 2**63)),
    max_nodes=st.integers(0, 20),
    max_depth=st.integers(0, 4),
    beam=st.integers(1, 6),
    min_confidence=st.sampled_from([0.0, 0.05, 0.5]),
)


def top_3(model: torch.Tensor) -> torch.Tensor:
    """The model with two of five tokens filtered."""
    return model.masked_fill(model < model.topk(3).values[:, -1:], -torch.inf).log_softmax(-1)


@given(builders, st.integers(0, 50))
def test_every_builder(builder: Expansion, model_seed: int) -> None:
    model = top_3(markov_model(model_seed, 5))
    tree = grow(builder, model)
    tree.check_vocabulary(5)
    assert builder.frontier() == []
    assert tree.subtree_order() == list(range(len(tree)))
    for node, parent in enumerate(tree.parents[1:], start=1):
        assert model[tree.token_ids[parent], tree.token_ids[node]] > -torch.inf, "a filtered token is no child"
    inner = set(tree.parents[1:])
    assert set(tree.distributions) in (set(), inner)
    for node, q in tree.distributions.items():
        assert torch.equal(q, model[tree.token_ids[node]].exp())


@given(builders, st.integers(0, 50), st.lists(st.integers(0, 4), max_size=5))
def test_slots(builder: Expansion, model_seed: int, accepted: list[int]) -> None:
    """Masks and matches say where the KV of a path is, by the order of evaluation alone."""
    model = markov_model(model_seed, 5)
    while frontier := builder.frontier():
        slots = [*builder.evaluated, *frontier]
        for node, mask in zip(frontier, builder.frontier_masks(), strict=True):
            seen = [slots[slot] for slot in range(len(slots)) if mask >> slot & 1]
            paths = [builder.path_tokens(ancestor) for ancestor in seen]
            assert paths == [builder.path_tokens(node)[:length] for length in range(builder.depth(node) + 1)]
        builder.extend(model[[builder.token_ids[node] for node in frontier]])
    evaluated = {builder.path_tokens(node): slot for slot, node in enumerate(builder.evaluated)}
    expected = []
    for length in range(len(accepted) + 1):
        if tuple(accepted[:length]) not in evaluated:
            break
        expected.append(evaluated[tuple(accepted[:length])])
    assert builder.slots().match(accepted) == expected


@pytest.mark.parametrize("selection", ChildSelection)
def test_static_shape(selection: ChildSelection) -> None:
    policy = ChildPolicy(selection, seed=3)
    tree = grow(StaticExpansion(2, 7, policy, widths=(1, 1, 3, 1), max_nodes=99), markov_model(0, 5))
    assert tree.parents == (-1, 0, 1, 2, 3, 2, 5, 2, 7)
    cut = grow(StaticExpansion(2, 7, policy, widths=(2, 2), max_nodes=4, source="s"), markov_model(0, 5))
    assert cut.parents == (-1, 0, 1, 0, 3), "the cut level has first children before second ones"
    assert cut.source == "s"


def test_children_stand_in_the_order_of_preference() -> None:
    model = markov_model(4, 9)
    for selection, noise in ((TOP, torch.zeros(2, 9)), (SHARED_NOISE, gumbel_noise(5, [30, 31], 9))):
        tree = grow(StaticExpansion(1, 30, ChildPolicy(selection, 5), widths=(4, 4), max_nodes=99), model)
        depths = tree.depths()
        for node, children in enumerate(tree.children()):
            if children:
                ranking = (model[tree.token_ids[node]] + noise[depths[node]]).argsort(descending=True)
                assert [tree.token_ids[child] for child in children] == ranking[:4].tolist()


def best_confidences(model: torch.Tensor, root: int, depth: int, count: int) -> list[float]:
    """Probabilities of the most probable token paths of at most `depth`, by trying all; best first."""
    p = model.double().exp().tolist()
    probabilities = [
        math.prod(p[parent][child] for parent, child in itertools.pairwise((root, *path)))
        for length in range(1, depth + 1)
        for path in itertools.product(range(len(p)), repeat=length)
    ]
    return sorted(probabilities, reverse=True)[:count]


@pytest.mark.parametrize("model_seed", range(6))
@pytest.mark.parametrize("max_nodes", [1, 4, 12])
def test_best_first_finds_the_most_probable_paths(model_seed: int, max_nodes: int) -> None:
    model = markov_model(model_seed, 4)
    builder = BestFirstExpansion(1, 5, ChildPolicy(TOP), max_nodes=max_nodes, max_depth=4, beam=max_nodes)
    paths = set(token_paths(grow(builder, model)))
    found = [
        builder.confidence(node) for node in range(1, len(builder.token_ids)) if builder.path_tokens(node) in paths
    ]
    assert sorted(found, reverse=True) == pytest.approx(best_confidences(model, 1, 4, max_nodes))


def test_hopeless_nodes_cost_no_step() -> None:
    sure = torch.tensor([[0.96, 0.04], [0.5, 0.5]]).log()

    def evaluations(min_confidence: float, root: int) -> int:
        builder = BestFirstExpansion(
            root, 1, ChildPolicy(TOP), max_nodes=40, max_depth=6, min_confidence=min_confidence
        )
        grow(builder, sure)
        return len(builder.evaluated)

    assert evaluations(0.9, root=1) == 1, "from the unsure root on, only the root"
    assert evaluations(0.9, root=0) == 3, ".96, .96^2 = .92, but not .96^3 = .88"
    assert evaluations(0.0, root=1) > 20


def test_more_candidates_than_a_tree_may_have() -> None:
    builder = BestFirstExpansion(0, 1, ChildPolicy(TOP), max_nodes=100, max_depth=6)
    tree = grow(builder, markov_model(0, 200, 3.0))
    assert len(builder.token_ids) > MAX_NODES
    assert len(tree) == 101


def test_rounding_keeps_parents() -> None:
    """Log-probabilities a little above 0, as rounding leaves them in a certain model."""
    certain = torch.full((3, 3), -50.0)
    certain.fill_diagonal_(1e-6)
    for max_nodes in range(1, 6):
        builder = BestFirstExpansion(2, 1, ChildPolicy(TOP), max_nodes=max_nodes, max_depth=5)
        assert grow(builder, certain).parents == tuple(range(-1, max_nodes))


def test_beam_bounds_a_level() -> None:
    builder = BestFirstExpansion(0, 1, ChildPolicy(TOP), max_nodes=30, max_depth=3, beam=2)
    model = markov_model(0, 8)
    sizes = []
    while frontier := builder.frontier():
        sizes.append(len(frontier))
        builder.extend(model[[builder.token_ids[node] for node in frontier]])
    assert sizes == [1, 2, 2]


SampledBuilder = Callable[[int], Expansion]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda seed: StaticExpansion(
                0, 1, ChildPolicy(SAMPLED, seed), widths=(3, 2), max_nodes=7, min_confidence=0.1
            ),
            id="static",
        ),
        pytest.param(
            lambda seed: BestFirstExpansion(
                0, 1, ChildPolicy(SAMPLED, seed), max_nodes=9, max_depth=3, beam=2, min_confidence=0.01
            ),
            id="best first",
        ),
    ],
)
def test_the_number_of_draws_does_not_depend_on_them(make: SampledBuilder) -> None:
    """Every row is the same distribution, so that only the draws differ: the shape must not."""
    model = markov_model(2, 6)[0].expand(6, -1)
    builders = [make(seed) for seed in range(50)]
    trees = [grow(builder, model) for builder in builders]
    assert len({tree.token_ids for tree in trees}) > 20
    assert len({tree.parents for tree in trees}) == 1
    for builder, tree in zip(builders, trees, strict=True):
        assert len(tree) == len(builder.token_ids), "nothing drawn is pruned"


def test_draws_are_without_replacement() -> None:
    q = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = np.zeros((4, 4))
    for seed in range(3000):
        builder = StaticExpansion(0, 1, ChildPolicy(SAMPLED, seed, stream=8), widths=(2,), max_nodes=2)
        first, second = grow(builder, q.log().expand(4, -1)).token_ids[1:]
        counts[first, second] += 1
    p = q.double().numpy()
    expected = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(4)] for i in range(4)])
    assert chi_square_p_value(counts, expected) > ALPHA


def test_streams_draw_differently() -> None:
    model = markov_model(2, 50)

    def drawn(seed: int, stream: int) -> tuple[int, ...]:
        policy = ChildPolicy(SAMPLED, seed, stream)
        return grow(StaticExpansion(0, 1, policy, widths=(5, 5), max_nodes=30), model).token_ids

    assert drawn(1, 0) == drawn(1, 0)
    assert len({drawn(1, 0), drawn(1, 1), drawn(2, 0), drawn(1, 2**63)}) == 4


@pytest.mark.parametrize("rule", [AcceptanceRule.SHARED_NOISE, AcceptanceRule.MSS, AcceptanceRule.GREEDY])
def test_a_perfect_draft_is_accepted_whole(rule: AcceptanceRule) -> None:
    """The draft's noise is the verifier's at every depth."""
    model = markov_model(6, 12)
    for seed in range(20):
        policy = ChildPolicy(rule.selection, seed)
        tree = grow(StaticExpansion(3, 17, policy, widths=(1,) * 5, max_nodes=5), model)
        accepted = step(rule, model, MergedDraft.single(tree), seed, 17)
        assert accepted.nodes == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0])
def test_temperature_changes_confidences_and_not_the_ranking(temperature: float) -> None:
    model = markov_model(4, 9)
    plain, softened = (
        grow(StaticExpansion(1, 3, ChildPolicy(TOP, temperature=each), widths=(4, 2), max_nodes=99), model)
        for each in (1.0, temperature)
    )
    assert (softened.token_ids, softened.parents) == (plain.token_ids, plain.parents)
    estimates = (model.double() / temperature).log_softmax(-1)
    for node, parent in enumerate(softened.parents[1:], start=1):
        step = estimates[softened.token_ids[parent], softened.token_ids[node]].item()
        assert softened.confidences[node] == pytest.approx(softened.confidences[parent] + step, abs=1e-4)


def test_the_temperature_is_for_greedy_requests_alone() -> None:
    calibration = Calibration(greedy_temperature=3.0, disagreement=0.7)
    for selection, params, temperature in (
        (TOP, SamplingParams(temperature=0, seed=4), 3.0),
        (TOP, SamplingParams(temperature=0.5, seed=4), 1.0),
        (SAMPLED, SamplingParams(seed=4), 1.0),
    ):
        policy = ChildPolicy.calibrated(selection, params, 8, calibration)
        assert policy == ChildPolicy(selection, 4, 8, temperature, 0.7)


def outcomes(rule: AcceptanceRule, disagreement: float, width: int) -> np.ndarray:
    """(confidence, accepted) of every child where log p - log q is Gumbel noise of the assumed scale: [n, 2]."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for seed in range(1200):
        q = (torch.randn(24, generator=generator) * (1 + seed % 3)).log_softmax(-1)
        uniforms = torch.rand(24, generator=generator).clamp_(1e-6, 1 - 1e-6)
        p = (q - disagreement * (-uniforms.log()).log()).log_softmax(-1)
        policy = ChildPolicy(rule.selection, seed, temperature=disagreement, disagreement=disagreement)
        builder = StaticExpansion(0, 1, policy, widths=(width,), max_nodes=width)
        tree = grow(builder, q.expand(24, -1))
        accepted = step(rule, p.expand(24, -1), MergedDraft.single(tree), seed, 1).nodes
        rows += [(builder.confidence(child), float(child in accepted)) for child in range(1, len(tree))]
    return np.array(rows)


@pytest.mark.parametrize(
    ("rule", "disagreement", "tolerance"),
    [
        # Exact under its assumption: four standard deviations of the fullest bin's mean.
        (AcceptanceRule.SHARED_NOISE, 0.4, 0.07),
        (AcceptanceRule.SHARED_NOISE, 0.8, 0.07),
        (AcceptanceRule.GREEDY, 0.4, 0.07),
        (AcceptanceRule.GREEDY, 2.0, 0.07),
        # By a formula fitted roughly.
        (AcceptanceRule.MSS, 0.4, 0.12),
    ],
)
def test_confidences_are_calibrated(rule: AcceptanceRule, disagreement: float, tolerance: float) -> None:
    rows = outcomes(rule, disagreement, 3)
    bins = np.minimum((rows[:, 0] * 5).astype(int), 4)
    for index in range(5):
        if (inside := rows[bins == index]).shape[0] > 100:
            confidence, accepted = inside.mean(axis=0)
            assert accepted == pytest.approx(confidence, abs=tolerance), f"bin {index} of {len(inside)}"
    assert len(set(bins)) >= 3


def refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_limits_are_refused() -> None:
    policy = ChildPolicy(TOP)
    refused(lambda: StaticExpansion(0, 1, policy, widths=(1, 0), max_nodes=3), r"widths are \[1, 0\]")
    refused(lambda: StaticExpansion(0, 1, policy, widths=(1,), max_nodes=256), r"max_nodes is 256; .* 0\.\.255")
    refused(lambda: StaticExpansion(0, 1, policy, widths=(1,), max_nodes=3, min_confidence=2), "min_confidence is 2")
    refused(lambda: BestFirstExpansion(0, 1, policy, max_nodes=3, max_depth=-1), "max_depth is -1")
    refused(lambda: BestFirstExpansion(0, 1, policy, max_nodes=3, max_depth=1, beam=0), "beam 0")
    refused(lambda: ChildPolicy(TOP, disagreement=0), "disagreement is 0")
    refused(lambda: ChildPolicy(TOP, temperature=0.001), r"temperature is 0.001; it must be a number in 0.01\.\.100")


@pytest.mark.parametrize("shape", [(2, 4), (4,), (0, 4)])
def test_rows_must_fit_the_frontier(shape: Sequence[int]) -> None:
    builder = StaticExpansion(0, 1, ChildPolicy(TOP), widths=(1,), max_nodes=3)
    refused(lambda: builder.extend(torch.zeros(tuple(shape))), "the frontier has 1 nodes")
    builder.extend(torch.zeros(1, 4))
    refused(lambda: builder.extend(torch.zeros(0, 4)), "the frontier has 0 nodes")


def test_worse_models_are_accepted_less() -> None:
    """The order that the confidences are meant to give: better drafts, longer accepted paths."""
    llm = markov_model(1, 8)
    lengths = []
    for scale in (0.0, 0.7, 2.0):
        total = 0
        for seed in range(150):
            builder = BestFirstExpansion(0, 1, ChildPolicy(SHARED_NOISE, seed), max_nodes=8, max_depth=4)
            draft = MergedDraft.single(grow(builder, perturbed(llm, 3, scale)))
            total += len(step(AcceptanceRule.SHARED_NOISE, llm, draft, seed, 1).nodes)
        lengths.append(total / 150)
    assert lengths[0] > 3.8
    assert lengths[0] > lengths[1] > lengths[2]
