"""What the budget makes of known costs and acceptance: a simulated machine whose clock says what a step must take."""

from __future__ import annotations

import json
import random

import pytest

from runtime.kv_cache import CachedSequence
from services.verifier.budget import Wish
from services.verifier.draft_chooser import DraftChooser
from services.verifier.draft_options import Options
from services.verifier.knowledge import SHARE
from services.verifier.measured_budget import MeasuredBudget
from services.verifier.scheduler import SequencePlan
from services.verifier.step_prices import StepPrices
from speculation.children import ChildSelection
from speculation.experience import Gain
from speculation.guard import Guards
from speculation.step_curve import StepCurve
from tests.services.verifier.simulated_machine import NODES, Seconds, World, memory_bound, small_cpu


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


@pytest.mark.parametrize(("streams", "right"), [(1, 0.7), (8, 0.9)])
def test_no_larger_trees_are_asked_for_than_may_pay(streams: int, right: float) -> None:
    """But for one now and then, to learn from it."""
    world = World(small_cpu, right)
    world.speedup(streams, steps=300)
    last = world.wanted[-100:]
    assert len(last) == 100
    assert 0 < last.count(NODES) / 100 < 0.05


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


@pytest.mark.parametrize(("streams", "right", "each"), [(1, 0.6, 0.0002), (2, 0.7, 0.0006), (4, 0.7, 0.0002)])
def test_plain_steps_are_measured_in_a_row(streams: int, right: float, each: float) -> None:
    """Between drafted ones they are slow, since the LLM's weights have left the cache, for a dozen steps."""
    ratios = []
    for seed in range(6):
        world = World(small_cpu, right, costs=(0.0006, each, 0.0001), behind=0.3, fades=12, seed=seed)
        ratios.append(world.speedup(streams, steps=600))
    assert sum(ratios) / 6 > 0.97


@pytest.mark.parametrize("streams", [8, 16])
def test_trials_count_the_slower_steps_behind_them(streams: int) -> None:
    ratios = []
    for seed in range(4):
        world = World(small_cpu, right=0.6, costs=(0.0006, 0.0006, 0.0001), behind=0.3, fades=12, seed=seed)
        world.speedup(streams, steps=600)
        ratios.append(world.speedup(streams, steps=1000))
    assert sum(ratios) / 4 > 0.99


def test_a_load_that_is_only_passed_through_costs_no_plain_steps() -> None:
    """Streams that end one by one, again and again: plain steps in a row are never known of the smaller loads."""
    world = World(memory_bound, right=0.8)
    for _ in range(12):
        for streams, steps in ((8, 40), (4, 8), (2, 8), (1, 8)):
            world.speedup(streams, steps=steps)
    assert world.asked[-256:].count(0) < 26


def test_drafting_does_not_begin_for_a_step_or_two() -> None:
    """Where many decode plainly, one less does so too until the next one comes, though that would pay for longer."""
    world = World(small_cpu, right=0.7)
    world.speedup(1, steps=400)
    world.right = 0.0
    world.speedup(2, steps=600)
    world.right = 0.7
    for _ in range(10):
        world.speedup(2, steps=20)
        asked = len(world.asked)
        world.speedup(1, steps=2)
        assert sum(world.asked[asked:]) == 0
    world.speedup(1, steps=300)
    assert world.asked[-80:].count(1) > 40


def test_models_draft_again_behind_a_slow_minute_though_look_up_pays_too() -> None:
    again = []
    for seed in range(4):
        world = World(small_cpu, right=0.8, looked_up=0.7, seed=seed)
        world.speedup(1, steps=400)
        costs = world.costs
        world.step, world.costs = (lambda rows: 4 * small_cpu(rows)), (4 * costs[0], 4 * costs[1], 4 * costs[2])
        world.speedup(1, steps=60)
        world.step, world.costs = small_cpu, costs
        world.speedup(1, steps=800)
        again.append(sum(world.models[-100:]) / 100)
    assert min(again) > 0.8


def test_drafting_that_pays_survives_a_cold_start() -> None:
    ratios = []
    for seed in range(6):
        world = World(small_cpu, right=0.7, cold=24, seed=seed)
        world.speedup(1, steps=200)
        ratios.append(world.speedup(1, steps=500))
    assert min(ratios) > 1.05


@pytest.mark.parametrize("streams", [4, 8])
def test_plain_steps_that_were_thought_too_fast_do_not_make_drafting_look_good(streams: int) -> None:
    """While the price of a step is corrected, what is known of plain steps stays what the clock said."""
    ratios = []
    for seed in range(12):
        costs = (0.0006, 0.0012, 0.0003)
        world = World(small_cpu, right=0.6, says=0.8, costs=costs, measured=lambda rows: small_cpu(rows) / 3, seed=seed)
        ratios.append(world.speedup(streams, steps=300))
    assert sum(ratios) / 12 > 0.97


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


def test_what_the_first_steps_are_asked_for_is_asked_for_once() -> None:
    world = World(small_cpu, right=0.8)
    world.speedup(1, steps=400)
    before = world.budget.state()
    world.restart()
    after = world.budget.state()
    assert after["steps"] == before["steps"] > 256
    assert after["drafts"] == before["drafts"] > 128


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


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_what_comes_of_sampled_children_decides_nothing_about_another_sequence(chance: float) -> None:
    """Of two with the same prompt and seed, one ahead, the other meets the same noise later."""
    options, prices = Options(NODES), StepPrices(StepCurve({rows: small_cpu(rows) for rows in (1, 8, 64)}))
    world = World(small_cpu, right=0.7)
    first, other = (
        Wish(SequencePlan(sequence, 2, True, NODES, 8), ChildSelection.SAMPLED)
        for sequence in (world.sequence(400), world.sequence(400))
    )
    sizes = []
    for taught in (False, True):
        chooser = DraftChooser(options, prices, Guards(2), NODES)
        if taught:
            gain = chooser.own_gains[first.id] = Gain(options.sizes)
            for _ in range(64):
                gain.learn([chance] * NODES, NODES)
        sizes.append(chooser.drawn(chooser.reckon(2, 2), [first, other]))
    assert sizes[0][other.id] == sizes[1][other.id] > 0
    assert (sizes[1].get(first.id, 0) > 0) is (chance > 0.5)


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
    for _ in range(60):
        world.one_step([sequence])
        openings.append(world.opened)
    first = world.asked.index(1)
    assert openings == [[sequence] if step == first - 1 else [] for step in range(60)]
