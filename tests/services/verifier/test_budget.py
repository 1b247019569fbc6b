"""What the budget makes of known costs and acceptance: a simulated machine whose clock says what a step must take."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from runtime.kv_cache import CachedSequence
from services.verifier.budget import Ask, Wish
from services.verifier.knowledge import SHARE
from services.verifier.measured_budget import MeasuredBudget
from services.verifier.request import GenerationRequest
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence
from speculation.acceptance import Accepted
from speculation.children import ChildSelection
from speculation.logits import LogitsPipeline
from speculation.sampling import SamplingParams
from speculation.step_curve import StepCurve
from speculation.tree import TokenTree

NODES, DEPTH = 16, 8
GREEDY = SamplingParams(temperature=0)
Seconds = Callable[[int], float]


def memory_bound(rows: int) -> float:
    """A large model on a device that reads its weights for 64 rows as fast as for one."""
    return 0.020 + 0.0001 * max(0, rows - 64)


def small_cpu(rows: int) -> float:
    return 0.002 + 0.0004 * rows


@dataclass
class World:
    """step: true seconds by rows. measured: what the start-up found instead. noise: relative, of every time.

    says, right: confidence of a first child below its parent, and how often it is right. costs: seconds of a round
    trip, of a drafted sequence, of a level. overhead: of each sequence in a step. hidden: share that a step with drafts
    takes longer, which no model of costs knows of. behind: share that a step takes longer behind one with drafts, of
    which more is left to hand out.
    looked_up: how often the token that look-up proposes is right. down: no speculator can be asked.
    prompt: tokens of each. fresh: seconds for each token that the drafts do not know. waking: share that drafting takes
    longer behind a step without drafts. cold: steps in the beginning, each of which takes twice as long.
    """

    step: Seconds
    right: float
    says: float = 0.7
    measured: Seconds | None = None
    costs: tuple[float, float, float] = (0.0006, 0.0001, 0.00005)
    overhead: float = 0.0003
    hidden: float = 0.0
    behind: float = 0.0
    noise: float = 0.05
    seed: int = 1
    selection: ChildSelection = ChildSelection.TOP
    looked_up: float = 0.0
    down: bool = False
    prompt: int = 3
    fresh: float = 0.0
    waking: float = 0.0
    cold: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.budget = self.fresh_budget()
        self.nodes: list[int] = []
        self.asked: list[int] = []
        self.models: list[bool] = []
        self.wanted: list[int] = []  # most nodes of a tree, of steps that draft
        self.drafted: dict[int, int] = {}
        self.told: dict[int, int] = {}
        self.opened: list[Sequence] = []
        self._ids = itertools.count(1)

    def fresh_budget(self) -> MeasuredBudget:
        curve = self.measured or self.step
        points = {rows: curve(rows) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
        return MeasuredBudget(StepCurve(points), NODES, DEPTH)

    def restart(self) -> None:
        """With what was kept."""
        kept = json.loads(json.dumps(self.budget.state()))
        self.budget = self.fresh_budget()
        self.budget.restore(kept, SHARE)

    def speedup(self, streams: int, steps: int = 1500, tokens_each: int = 120) -> float:
        """Tokens a second against plain decoding with the same streams, which end and begin."""
        sequences = [self.sequence(tokens_each) for _ in range(streams)]
        tokens, seconds = 0, 0.0
        for _ in range(steps):
            for place, sequence in enumerate(sequences):
                if sequence.remaining <= 0:
                    self.budget.forget(sequence.id)
                    sequences[place] = self.sequence(tokens_each)
            added, took = self.one_step(sequences)
            tokens, seconds = tokens + added, seconds + took
        return tokens / seconds / (streams / (self.step(streams) + self.overhead * streams))

    def sequence(self, tokens: int) -> Sequence:
        request = GenerationRequest("r", tuple(range(self.prompt)), GREEDY, tokens)
        return Sequence(next(self._ids), request, lambda _output: None, LogitsPipeline(GREEDY, request.prompt, 320))

    def one_step(self, sequences: list[Sequence]) -> tuple[int, float]:
        plans = []
        for sequence in sequences:
            depth = 0 if self.budget.resting else min(DEPTH, sequence.remaining - 1)
            sequence.cache = CachedSequence(length=len(sequence.tokens) - 1)
            plans.append(SequencePlan(sequence, sequence.cache.length, True, NODES if depth > 0 else 0, max(depth, 0)))
        wishes = [Wish(plan, self.selection) for plan in plans if plan.draft_nodes]
        ask = self.budget.ask(plans, wishes)
        asked = [] if self.down else [wish for wish in wishes if wish.id in ask.nodes]
        self.opened = list(ask.opening)
        for sequence in ask.opening:
            self.unknown(sequence)
        trees = {wish.id: self.trees(wish, ask) for wish in asked}
        self.drafted = {i: sum(len(tree) - 1 for tree in found) for i, found in trees.items()}
        if trees:
            self.models.append(ask.models)
            self.wanted.append(max(ask.nodes.values()))
        once, each, level = self.costs
        drafting = 0.000015
        if trees:
            deepest = [max(max(tree.depths()) for tree in found) if ask.models else 0 for found in trees.values()]
            added = once + (sum(each + level * depth for depth in deepest) if ask.models else 0)
            drafting += added * (1 + self.waking * (not self.asked or not self.asked[-1]))
            drafting += self.fresh * sum(self.unknown(plan.sequence) for plan in plans if plan.sequence.id in trees)
        drafts = self.budget.merge(ask, wishes, trees if trees else None)
        accepted = {
            plan.sequence.id: self.accept(drafts[plan.sequence.id].tree) for plan in plans if plan.sequence.id in drafts
        }
        accepted |= {s.id: Accepted((), (1,)) for s in sequences if s.id not in drafts}
        rows = len(sequences) + sum(len(draft.tree) - 1 for draft in drafts.values())
        after_drafts = bool(self.asked and self.asked[-1])
        self.nodes.append(rows - len(sequences))
        self.asked.append(len(trees))
        verifying = self.step(rows) + self.overhead * len(sequences)
        verifying *= 1 + self.hidden * bool(trees) + self.behind * after_drafts
        if len(self.nodes) <= self.cold:
            drafting, verifying = 2 * drafting, 2 * verifying
        drafting, verifying = (value * self.random.lognormvariate(0, self.noise) for value in (drafting, verifying))
        self.budget.learn(ask, accepted, drafting, verifying)
        return sum(len(s.append(accepted[s.id].token_ids)) for s in sequences), drafting + verifying

    def unknown(self, sequence: Sequence) -> int:
        """How many of its tokens the drafts did not know; now they do."""
        known, self.told[sequence.id] = self.told.get(sequence.id, 0), len(sequence.tokens)
        return len(sequence.tokens) - known

    def trees(self, wish: Wish, ask: Ask) -> list[TokenTree]:
        """A chain with a second choice at each level; look-up guesses one token."""
        found = []
        if ask.models:
            tokens, parents, says = [1], [-1], [1.0]
            node = 0
            for _ in range(wish.plan.draft_depth):
                if says[node] < ask.floor or len(tokens) + 2 > ask.nodes[wish.id] + 1:
                    break
                tokens += [2, 3]
                parents += [node, node]
                says += [says[node] * self.says, says[node] * (1 - self.says) / 2]
                node = len(tokens) - 2
            found.append(TokenTree(tuple(tokens), tuple(parents), {}, "ssm", tuple(map(math.log, says))))
        if self.looked_up:
            found.append(TokenTree((1, 2), (-1, 0), {}, "prompt-lookup", (0.0, math.log(0.5))))
        return found

    def accept(self, tree: TokenTree) -> Accepted:
        path: list[int] = []
        node, children = 0, tree.children()
        while True:
            chance = self.right if len(path) or not self.looked_up else max(self.right, self.looked_up)
            token = 2 if self.random.random() < chance else 9
            below = [child for child in children[node] if tree.token_ids[child] == token]
            if not below:
                return Accepted(tuple(path), tuple([1] * (len(path) + 1)))
            node = below[0]
            path.append(node)


@pytest.mark.parametrize("right", [0.0, 0.3])
@pytest.mark.parametrize("step", [small_cpu, memory_bound])
@pytest.mark.parametrize("streams", [1, 2, 4, 8, 16, 32])
def test_bad_drafts_cost_next_to_nothing(streams: int, step: Seconds, right: float) -> None:
    """However sure of themselves they are."""
    world = World(step, right, says=0.9)
    world.speedup(streams, steps=400)  # learns
    assert world.speedup(streams, steps=600) > 0.97


@pytest.mark.parametrize("streams", [1, 4, 32])
def test_drafts_of_look_up_stay_when_models_do_not_pay(streams: int) -> None:
    world = World(small_cpu, right=0.0, looked_up=0.9, costs=(0.0006, 0.003, 0.001))
    world.speedup(streams, steps=2000)
    assert world.speedup(streams, steps=300) > 1.1
    assert world.models[-50:].count(True) < 10


def test_large_trees_on_a_memory_bound_device_small_ones_on_a_cpu_none_when_the_batch_is_full() -> None:
    def nodes(step: Seconds, streams: int) -> float:
        world = World(step, right=0.7)
        world.speedup(streams, steps=500)
        return sum(world.nodes[-200:]) / 200 / streams

    assert nodes(memory_bound, 1) > 12 > 5 > nodes(small_cpu, 1) > 1.5
    assert nodes(memory_bound, 1) > nodes(memory_bound, 8) > nodes(memory_bound, 32) > 0.5
    assert nodes(small_cpu, 32) < 0.3


def test_of_several_sequences_no_larger_trees_are_asked_for_than_may_pay() -> None:
    """But for one whole tree now and then, to learn from it."""
    for streams, whole in ((1, 1.0), (8, 0.05)):
        world = World(small_cpu, right=0.9)
        world.speedup(streams, steps=300)
        last = world.wanted[-100:]
        assert len(last) == 100
        assert last.count(NODES) / 100 == pytest.approx(whole, abs=0.05)


def best_fixed(step: Seconds, streams: int) -> float:
    """Speed-up of the best chain of one length, at the default costs of a world, where 0.7 of the tokens are right.

    The second children that a world's drafts have are never right, and take no part.
    """

    def fixed(depth: int) -> float:
        draw, seconds = random.Random(0), 0.0
        left = [120] * streams * 50
        while left:
            running, depths = min(streams, len(left)), [min(depth, tokens - 1) for tokens in left[:streams]]
            right = [next((d for d in range(most) if draw.random() > 0.7), most) for most in depths]
            seconds += step(running + sum(depths)) + 0.0003 * running + 0.000015
            seconds += 0.0006 + sum(0.0001 + 0.00005 * most for most in depths)
            left = [tokens - came - 1 for tokens, came in zip(left, right, strict=False)] + left[streams:]
            left = [tokens for tokens in left if tokens > 0]
        return 120 * streams * 50 / seconds

    return max(map(fixed, range(1, 9))) * (step(streams) + 0.0003 * streams) / streams


@pytest.mark.parametrize(("step", "streams"), [(small_cpu, 1), (small_cpu, 2), (memory_bound, 1), (memory_bound, 4)])
def test_good_drafts_come_near_the_best_fixed_size(step: Seconds, streams: int) -> None:
    """Within 100 steps from nothing, and at once with what an earlier run knew."""
    best = best_fixed(step, streams)
    cold, warm = [], []
    for seed in range(16):
        world = World(step, right=0.7, seed=seed)
        world.speedup(streams, steps=100)
        cold.append(world.speedup(streams, steps=300))
        world.restart()
        warm.append(world.speedup(streams, steps=300))
    assert sum(cold) / 16 > 0.95 * best
    assert sum(warm) / 16 > 0.95 * best


def test_a_cold_start_does_not_spoil_what_is_known_of_large_steps() -> None:
    for seed in range(8):
        world = World(small_cpu, right=0.7, seed=seed, cold=24)
        world.speedup(1, steps=400)
        assert world.budget.curve.seconds(64) > 0.8 * small_cpu(64)


@pytest.mark.parametrize("hidden", [0.0, 0.3])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("streams", [1, 2, 4, 8, 16, 32])
def test_drafting_that_never_pays_loses_little_from_the_first_step(streams: int, right: float, hidden: float) -> None:
    """A drafter as dear as a step, however sure of itself, that slows the steps behind it in a way nobody expects."""
    cold, warm = [], []
    for seed in range(6):
        world = World(small_cpu, right, says=0.9, costs=(0.0006, 0.002, 0.0003), hidden=hidden, seed=seed)
        cold.append(world.speedup(streams, steps=500))
        world.restart()
        warm.append(world.speedup(streams, steps=500))
    assert sum(cold) / 6 > 0.97
    assert sum(warm) / 6 > 0.97


@pytest.mark.parametrize(("behind", "right", "each"), [(0.3, 0.6, 0.0004), (0.5, 0.6, 0.0008), (0.5, 0.7, 0.0004)])
def test_plain_steps_are_not_taken_for_as_slow_as_behind_drafts(behind: float, right: float, each: float) -> None:
    """Else drafting seems to gain what it loses."""
    ratios = []
    for seed in range(6):
        world = World(small_cpu, right, costs=(0.0006, each, 0.0001), behind=behind, seed=seed)
        world.speedup(1, steps=500)
        ratios.append(world.speedup(1, steps=1000))
    assert sum(ratios) / 6 > 0.98


def test_what_was_kept_is_doubted_when_the_machine_has_changed() -> None:
    world = World(small_cpu, right=0.8)
    world.speedup(1, steps=1000)
    world.right, world.costs = 0.1, (0.003, 0.001, 0.001)
    world.restart()
    assert world.speedup(1, steps=500) > 0.95
    world.right, world.costs = 0.8, (0.0006, 0.0001, 0.00005)
    world.restart()
    world.speedup(1, steps=3000)
    assert world.speedup(1, steps=500) > 1.3


def test_knowledge_of_another_form_is_refused() -> None:
    world = World(small_cpu, right=0.8)
    world.speedup(2, steps=100)
    state = json.loads(json.dumps(world.budget.state()))
    small = MeasuredBudget(StepCurve({1: 0.001}), 2, 2)
    with pytest.raises(ValueError, match="sizes"):
        small.restore(state, SHARE)
    for part in state:
        broken = {name: value for name, value in state.items() if name != part}
        with pytest.raises(KeyError):
            world.fresh_budget().restore(broken, SHARE)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda _rows: 0.003,
        lambda rows: 0.0002 * rows,
        lambda rows: 0.002 + 0.001 * rows,
        lambda rows: 0.1 * small_cpu(rows),
    ],
    ids=["flat", "steep", "dear", "fast"],
)
def test_a_wrong_curve_is_corrected_while_serving(wrong: Seconds) -> None:
    later = []
    for seed in range(6):
        world = World(small_cpu, right=0.7, measured=wrong, seed=seed)
        world.speedup(1, steps=1500)
        later.append(world.speedup(1, steps=1500))
    assert sum(later) / 6 > 1.2
    full = World(small_cpu, right=0.0, measured=wrong)
    full.speedup(16, steps=600)
    assert full.speedup(16, steps=600) > 0.97


def test_a_drafter_that_becomes_good_is_found_again() -> None:
    world = World(small_cpu, right=0.0)
    world.speedup(1, steps=800)
    assert sum(world.asked[-200:]) < 20
    world.right = 0.8
    world.speedup(1, steps=8000)
    assert world.speedup(1, steps=500) > 1.3


def test_nothing_is_learned_from_speculators_that_cannot_be_asked() -> None:
    world = World(small_cpu, right=0.8)
    before = world.speedup(1, steps=1000)
    world.down = True
    for _ in range(500):
        world.one_step([world.sequence(50)])
    world.down = False
    assert world.speedup(1, steps=200) > 0.9 * before


def test_sampled_children_learn_from_their_own_sequence_alone() -> None:
    """What becomes of one sequence's draws decides nothing about another's: they may share their noise."""
    bad = World(small_cpu, right=0.0, selection=ChildSelection.SAMPLED)
    first = bad.sequence(400)
    for _ in range(300):
        bad.one_step([first])
    assert sum(bad.asked[-100:]) <= 3, "it has stopped"
    fresh, asked = bad.sequence(400), []
    for _ in range(20):
        bad.one_step([fresh])
        asked.append(bad.asked[-1])
    untaught = World(small_cpu, right=0.9, selection=ChildSelection.SAMPLED)
    assert asked[0] == 1
    untaught.one_step([untaught.sequence(400)])
    assert untaught.asked == [1]


def test_sampled_trees_are_never_pruned() -> None:
    world = World(memory_bound, right=0.5, selection=ChildSelection.SAMPLED)
    sequence = world.sequence(400)
    for _ in range(50):
        world.one_step([sequence])
        drafted = world.drafted.get(sequence.id)
        assert drafted is None or world.nodes[-1] == drafted


def test_speculators_prepare_for_what_will_draft_when_its_prompt_is_computed() -> None:
    """After drafts that paid, and for sequences that have tokens left to draft."""
    world = World(memory_bound, right=0.9)
    long, short = world.sequence(40), world.sequence(2)
    for sequence in (long, short):
        sequence.cache = CachedSequence()
    plans = [SequencePlan(sequence, len(sequence.tokens) - 1, True, NODES, 2) for sequence in (long, short)]
    assert world.budget.ask(plans, []).opening == ()
    assert world.speedup(streams=1, steps=200) > 1
    assert world.budget.ask(plans, []).opening == [long]
    long.cache.length = len(long.tokens) - 1
    assert world.budget.ask(plans, []).opening == []


def test_speculators_prepare_for_a_plain_step_before_the_first_drafts() -> None:
    world = World(memory_bound, right=0.9, prompt=100)
    sequence = world.sequence(400)
    openings = []
    for _ in range(20):
        world.one_step([sequence])
        openings.append(world.opened)
    first = world.asked.index(1)
    assert openings == [[sequence] if step == first - 1 else [] for step in range(20)]
