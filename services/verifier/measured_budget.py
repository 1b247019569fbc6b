"""How much a step drafts and verifies, by measurement: what pays for itself.

Is told what things took. Nothing that is decided here changes a token: pruned trees are of rules that any tree suits,
and for sampled children only what has no part in their noise decides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.verifier.budget import Ask, DraftBudget, Wish
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from speculation.acceptance import Accepted
from speculation.budget import Choice, Floats, StepPrice, choose_drafting, nodes_that_pay
from speculation.children import ChildSelection
from speculation.experience import GAIN_MEMORY, RELIABILITY_MEMORY, Gain, LinearFit, Reliability
from speculation.guard import Guard
from speculation.merge import MergedDraft, merge_trees
from speculation.step_curve import StepCurve
from speculation.tree import TokenTree

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 255)
# Every so many drafted steps one is plain, and one verifies a whole tree, to see what is given away.
_PROBE_EVERY = 64
# Drafting that does not pay is tried again when it costs at most this share of the time since it was last tried.
_PROBE_SHARE = 0.004
_LEAST_PROBE_STEPS = 48
# The first probes come soon: little is known.
_FIRST_PROBES, _FIRST_PROBE_STEPS = 6, 16
# A probe of drafting that does not pay may add so much of a plain step.
_PROBE_ROWS_SHARE = 0.3
# Least probabilities of a path behind which small models go on that are told apart.
_FLOORS = (0.0, 0.1, 0.25, 0.5)
_SMOOTHING = 0.05
# Steps that a choice to draft, and one not to, is kept for while the same sequences run.
_HOLD_STEPS, _HOLD_PLAIN_STEPS = 8, 32
# Probes are rare: what the last of them say counts, not what was long ago.
_PROBE_MEMORY = 8.0


class Cost:
    """Milliseconds: of a round trip, of a sequence, of a level of its tree, of a token that is new to the drafts."""

    def __init__(self) -> None:
        self.fit = LinearFit((0.6, 0.05, 0.03, 0.01), (4, 4, 16, 400))
        self.idle_steps = 0  # since it was last measured, while no step drafts
        self.measured = 0


class Option:
    """One way to draft, and what it brings: with models that go on behind paths of at least `floor`, or by look-up."""

    def __init__(self, models: bool, floor: float, sizes: Sequence[int], cost: Cost) -> None:
        self.models = models
        self.floor = floor
        self.cost = cost
        self.gains = {selection: Gain(sizes) for selection in ChildSelection}
        self.depth = 3.0  # mean depth of a sequence's deepest tree

    def learn(self, selection: ChildSelection, tree: TokenTree | None, asked: int, floor: float, memory: float) -> None:
        """What a draft of all `asked` nodes tells that was made with this floor or a lower one; None: nothing came."""
        probabilities: list[float] = []
        depth = 0
        if tree is not None:
            least = math.log(self.floor) if self.floor > floor else -math.inf
            depths = tree.depths()
            for node in range(1, len(tree)):
                if tree.confidences[tree.parents[node]] >= least:
                    probabilities.append(math.exp(tree.confidences[node]))
                    depth = max(depth, depths[node])
        self.gains[selection].learn(sorted(probabilities, reverse=True), asked, memory)
        self.depth += _SMOOTHING * (depth - self.depth)


@dataclass
class _Origin:
    """What a draft was before measurements corrected it, to compare it with what comes of it.

    trees: of the sources. merged: their union, None for a single tree. nodes: those of the union that were kept.
    """

    trees: list[TokenTree]
    merged: TokenTree | None
    nodes: list[int]


@dataclass
class _Step:
    """The step under way: what it was expected to cost, and what was asked for it."""

    price: StepPrice
    rows: int
    alone: bool  # whether it has no prompt chunks
    guard: Guard
    sampled: bool  # whether a sequence has sampled children: what they bring must decide nothing for others
    option: Option | None = None
    asked: dict[int, int] = field(default_factory=dict)
    fresh: float = 0.0
    unpruned: int | None = None  # the sequence whose tree is kept whole, to learn from it
    idle_probe: bool = False  # whether one sequence drafts though it does not pay
    rare: bool = False  # whether it drafts only to see whether drafting pays by now
    depth: int = 0
    answered: bool = False
    drafts: dict[int, MergedDraft] = field(default_factory=dict)
    origins: dict[int, _Origin] = field(default_factory=dict)

    def memory(self, usual: float) -> float:
        return _PROBE_MEMORY if self.rare else usual

    @property
    def features(self) -> tuple[float, ...]:
        """What the cost of drafting is reckoned from."""
        return (1, len(self.asked), self.depth, self.fresh)


class MeasuredBudget(DraftBudget):
    """Drafts and verifies what makes tokens come fastest, by measured times and measured acceptance."""

    defers_first_drafts = True

    def __init__(self, curve: StepCurve, most_nodes: int, most_depth: int) -> None:
        self.curve = curve
        self._most_depth = most_depth
        self._sizes = [size for size in _SIZES if size < most_nodes] + [most_nodes]
        with_models, look_up = Cost(), Cost()
        self._options = [Option(True, floor, self._sizes, with_models) for floor in _FLOORS]
        self._options.append(Option(False, 0.0, self._sizes, look_up))
        self._reliability = Reliability()
        self._overhead = LinearFit((0.0, 0.0), (1, 1))  # milliseconds beyond the curve: of a step, of a sequence
        self._own_gains: dict[int, Gain] = {}  # of sequences with sampled children
        self._known: dict[int, int] = {}
        self._guards: defaultdict[int, Guard] = defaultdict(Guard)  # by bits of the number of sequences that decode
        self._drafted_steps = 0
        self._held: Choice | None = None
        self._held_for: tuple[tuple[int, ...], int] = ((), 0)
        self._held_steps = 0
        self._step: _Step | None = None

    def opening(self, plans: Sequence[SequencePlan]) -> Sequence[RunningSequence]:
        if self._held is None or not self._held.chosen:
            return ()
        opening = [plan.sequence for plan in plans if plan.computes_prompt and plan.sequence.wants_drafts]
        self._known.update({sequence.id: len(sequence.tokens) for sequence in opening})
        return opening

    def ask(self, plans: Sequence[SequencePlan], wishes: Sequence[Wish]) -> Ask:
        step = self._step = self._begin(plans, wishes)
        if not wishes:
            return Ask()
        if (step.sampled or step.guard.allows) and (choice := self._held_choice(step, wishes)).chosen:
            return self._drafted(step, choice, wishes)
        probed = min(wishes, key=self._fresh)
        for option in self._whole_options:
            option.cost.idle_steps += 1
        for option in self._whole_options:
            if option.cost.idle_steps >= self._probe_interval(step, option, probed):
                step.idle_probe, step.rare = True, option.cost.measured >= _FIRST_PROBES
                return self._order(step, option, [probed], self._probe_nodes(step, probed), probes=True)
        return Ask()

    @property
    def _whole_options(self) -> tuple[Option, Option]:
        """With models and without, of no floor: what they draft tells of all others."""
        return self._options[0], self._options[-1]

    def _begin(self, plans: Sequence[SequencePlan], wishes: Sequence[Wish]) -> _Step:
        decoding = sum(plan.decodes for plan in plans)
        chunks = sum(plan.chunk_end - plan.sequence.cache.length for plan in plans)
        rows = chunks + decoding
        most = sum(wish.plan.draft_nodes for wish in wishes)
        curve = self.curve.table(rows + most)[rows : rows + most + 1]
        overhead = self._overhead.predict((1, decoding)) / 1000
        price = StepPrice(decoding, curve + max(overhead, -0.95 * curve[0]))
        sampled = any(wish.selection is ChildSelection.SAMPLED for wish in wishes)
        return _Step(price, rows, chunks == 0, self._guards[decoding.bit_length()], sampled)

    def _held_choice(self, step: _Step, wishes: Sequence[Wish]) -> Choice:
        """The last choice again, for some steps of the same sequences: choosing takes time that a small model feels."""
        ids = tuple([wish.id for wish in wishes])
        if self._held is None or self._held_steps == 0 or self._held_for != (ids, step.rows):
            self._held, self._held_for = self._choose(step, wishes), (ids, step.rows)
            self._held_steps = _HOLD_STEPS if self._held.chosen else _HOLD_PLAIN_STEPS
        self._held_steps -= 1
        return self._held

    def _choose(self, step: _Step, wishes: Sequence[Wish]) -> Choice:
        weights = np.array([np.maximum(option.cost.fit.weights, 0) / 1000 for option in self._options])
        depth = np.array([option.depth for option in self._options])
        fresh = np.array([self._shared_fresh(wish) for wish in wishes])
        each = (weights[:, 1] + weights[:, 2] * depth)[:, None] + np.outer(weights[:, 3], fresh)
        gains = np.array([[self._gain(option, wish) for wish in wishes] for option in self._options])
        bounds = np.array([min(wish.plan.draft_nodes, wish.plan.draft_depth) for wish in wishes])
        gains = np.minimum(gains, bounds[:, None]).transpose(0, 2, 1)
        return choose_drafting(step.price, weights[:, 0], each, self._sizes, gains)

    def _gain(self, option: Option, wish: Wish) -> Floats:
        if wish.selection is not ChildSelection.SAMPLED:
            return option.gains[wish.selection].expected
        if option is self._options[0]:
            return self._own_gains.setdefault(wish.id, Gain(self._sizes)).expected
        return np.zeros(len(self._sizes))

    def _fresh(self, wish: Wish) -> int:
        return len(wish.plan.sequence.tokens) - self._known.get(wish.id, 0)

    def _shared_fresh(self, wish: Wish) -> float:
        """What catches up once is of use in all later steps, about two tokens each."""
        return self._fresh(wish) / max(1.0, wish.plan.sequence.remaining / 2)

    def _drafted(self, step: _Step, choice: Choice, wishes: Sequence[Wish]) -> Ask:
        self._drafted_steps += 1
        turn = self._drafted_steps % (2 * _PROBE_EVERY)
        chosen = [wishes[place] for place in choice.chosen]
        if turn % _PROBE_EVERY == 0:
            return Ask()
        if turn % _PROBE_EVERY == _PROBE_EVERY // 2:
            return self._order(step, self._whole_options[turn > _PROBE_EVERY], chosen, choice.size, probes=True)
        return self._order(step, self._options[choice.option], chosen, choice.size, probes=False)

    def _order(self, step: _Step, option: Option, chosen: Sequence[Wish], size: int, probes: bool) -> Ask:
        """probes: whether the first tree is verified whole, to learn from it."""
        step.option, option.cost.idle_steps = option, 0
        option.cost.measured += 1
        step.unpruned = chosen[0].id if probes else None
        for wish in chosen:
            nodes = wish.plan.draft_nodes
            sampled = wish.selection is ChildSelection.SAMPLED  # such trees cannot be pruned
            step.asked[wish.id] = min(size, nodes) if sampled or step.idle_probe else nodes
            step.fresh += self._fresh(wish)
            self._known[wish.id] = len(wish.plan.sequence.tokens)
        return Ask(step.asked, option.models, option.floor)

    def _probe_nodes(self, step: _Step, wish: Wish) -> int:
        """How many nodes a probe verifies: two at least where there is room, more where rows cost little."""
        seconds = step.price.seconds[: wish.plan.draft_nodes + 1]
        cheap = int(np.searchsorted(seconds, (1 + _PROBE_ROWS_SHARE) * seconds[0], side="right")) - 1
        return min(max(cheap, 2), wish.plan.draft_nodes)

    def _probe_interval(self, step: _Step, option: Option, wish: Wish) -> float:
        if option.cost.measured < _FIRST_PROBES:
            return _FIRST_PROBE_STEPS
        seconds = step.price.seconds
        verifying = float(seconds[self._probe_nodes(step, wish)] - seconds[0])
        drafting = option.cost.fit.predict((1, 1, option.depth, self._fresh(wish))) / 1000
        return max(_LEAST_PROBE_STEPS, (drafting + verifying) / (_PROBE_SHARE * float(seconds[0])))

    def merge(self, wishes: Sequence[Wish], trees: Mapping[int, list[TokenTree]] | None) -> dict[int, MergedDraft]:
        step = self._current()
        step.answered = trees is not None
        for wish in wishes:
            if wish.id in step.asked:
                found = (trees or {}).get(wish.id, [])
                step.depth += max((max(tree.depths()) for tree in found), default=0)
                self._merge(step, wish, found)
        self._prune(step)
        return step.drafts

    def _merge(self, step: _Step, wish: Wish, trees: list[TokenTree]) -> None:
        nodes = step.asked[wish.id]
        if wish.selection is ChildSelection.SAMPLED:
            if trees:
                step.drafts[wish.id] = merge_trees(trees, nodes)
            return
        draft = None
        if trees:
            draft = merge_trees([self._reliability.correct(tree) for tree in trees], nodes)
            merged = draft.tree if len(trees) > 1 else None
            if merged is not None:
                draft = draft.with_confidences(self._reliability.correct(merged).confidences)
            step.origins[wish.id] = _Origin(trees, merged, list(range(len(draft.tree))))
            step.drafts[wish.id] = draft
        if step.option is not None and step.answered and wish.plan.draft_depth == self._most_depth:
            for option in self._options:
                if option.models == step.option.models and option.floor >= step.option.floor:
                    tree = None if draft is None else draft.tree
                    option.learn(wish.selection, tree, nodes, step.option.floor, step.memory(GAIN_MEMORY))

    def _prune(self, step: _Step) -> None:
        free = [sequence_id for sequence_id in step.origins if sequence_id != step.unpruned]
        if not free:
            return
        fixed = sum(len(draft.tree) - 1 for sequence_id, draft in step.drafts.items() if sequence_id not in free)
        drafting = 0.0 if step.option is None else max(0.0, step.option.cost.fit.predict(step.features)) / 1000
        price = StepPrice(step.price.tokens, step.price.seconds[fixed:] + drafting)
        kept = nodes_that_pay([step.drafts[sequence_id].tree for sequence_id in free], price)
        for sequence_id, nodes in zip(free, kept, strict=True):
            draft = step.drafts[sequence_id]
            if len(nodes) == 1:
                del step.drafts[sequence_id], step.origins[sequence_id]
            elif len(nodes) < len(draft.tree):
                step.origins[sequence_id].nodes = nodes
                step.drafts[sequence_id] = draft.keep(nodes)

    def learn(self, accepted: Mapping[int, Accepted], draft_seconds: float, step_seconds: float) -> None:
        step, self._step = self._current(), None
        for sequence_id, draft in step.drafts.items():
            self._learn_acceptance(step, sequence_id, draft, accepted[sequence_id])
        for sequence_id in step.asked.keys() & self._own_gains.keys() - step.drafts.keys():
            self._own_gains[sequence_id].learn((), step.asked[sequence_id])
        rows = step.rows + sum(len(draft.tree) - 1 for draft in step.drafts.values())
        if step.option is not None and step.answered:
            fit = step.option.cost.fit
            fit.observe(step.features, _tamed(1000 * draft_seconds, fit.predict(step.features)))
        if step.alone and step.price.tokens:
            self._judge(step, accepted, draft_seconds + step_seconds)
            self._learn_times(step, rows, step_seconds + (draft_seconds if step.option is None else 0.0))

    def _judge(self, step: _Step, accepted: Mapping[int, Accepted], seconds: float) -> None:
        believed = float(step.price.seconds[0])
        if step.option is None:
            step.guard.plain(seconds, believed)
        elif step.answered and not step.idle_probe and not step.sampled:
            tokens = sum(len(path.token_ids) for path in accepted.values())
            step.guard.drafted(tokens, step.price.tokens, seconds, believed)

    def _learn_times(self, step: _Step, rows: int, seconds: float) -> None:
        """A plain step tells what the curve leaves out; a drafted one, beyond that, what its rows cost."""
        features = (1, step.price.tokens)
        if step.drafts:
            self.curve.observe(rows, max(seconds - self._overhead.predict(features) / 1000, seconds / 4))
        else:
            seconds = _tamed(seconds, float(step.price.seconds[0]))
            self._overhead.observe(features, 1000 * (seconds - self.curve.seconds(rows)))

    def _learn_acceptance(self, step: _Step, sequence_id: int, draft: MergedDraft, accepted: Accepted) -> None:
        if (origin := step.origins.get(sequence_id)) is None:
            self._own_gains[sequence_id].learn([1.0] * len(accepted.nodes), step.asked[sequence_id])
            return
        path, memory = set(accepted.nodes), step.memory(RELIABILITY_MEMORY)
        for tree, nodes in zip(origin.trees, draft.maps, strict=True):
            self._reliability.learn(tree, [node >= 0 for node in nodes], [node in path for node in nodes], memory)
        if origin.merged is not None:
            kept, right = set(origin.nodes), {origin.nodes[node] for node in path}
            every = range(len(origin.merged))
            verified, accepted_nodes = [node in kept for node in every], [node in right for node in every]
            self._reliability.learn(origin.merged, verified, accepted_nodes, memory)

    def forget(self, sequence_id: int) -> None:
        self._known.pop(sequence_id, None)
        self._own_gains.pop(sequence_id, None)

    def _current(self) -> _Step:
        assert self._step is not None, "ask comes first"
        return self._step


def _tamed(value: float, expected: float) -> float:
    """A measurement within a factor of 3: a disturbance must not be believed at once."""
    return min(max(value, expected / 3), 3 * expected)
