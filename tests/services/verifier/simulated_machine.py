"""A machine and its models whose clock says what a step must take: what the budget is tested against."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

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
    which more is left to hand out; it fades over so many plain steps, while the LLM's weights come back to the cache.
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
    fades: int = 1
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
        self.since_drafts = 1000  # plain steps
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
        behind = self.behind * max(0.0, 1 - self.since_drafts / self.fades)
        self.since_drafts = 0 if trees else self.since_drafts + 1
        self.nodes.append(rows - len(sequences))
        self.asked.append(len(trees))
        verifying = self.step(rows) + self.overhead * len(sequences)
        verifying *= 1 + self.hidden * bool(trees) + behind
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
        """The most probable nodes of a chain with a second choice at each level; look-up guesses one token."""
        found = []
        if ask.models:
            tokens, parents, says = [1], [-1], [1.0]
            node = 0
            for _ in range(wish.plan.draft_depth):
                if says[node] < ask.floor:
                    break
                tokens += [2, 3]
                parents += [node, node]
                says += [says[node] * self.says, says[node] * (1 - self.says) / 2]
                node = len(tokens) - 2
            tree = TokenTree(tuple(tokens), tuple(parents), {}, "ssm", tuple(map(math.log, says)))
            most = sorted(range(1, len(tree)), key=says.__getitem__, reverse=True)[: ask.nodes[wish.id]]
            found.append(tree.select([0, *sorted(most)]))
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
