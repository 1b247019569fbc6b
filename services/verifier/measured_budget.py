"""How much a step drafts and verifies, by measurement: what pays for itself.

Is told what things took. Nothing that is decided here changes a token: pruned trees are of rules that any tree suits,
and for sampled children only what has no part in their noise decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.verifier.budget import Ask, DraftBudget, Wish
from services.verifier.candidates import Candidate, make_candidates
from services.verifier.draft_chooser import DraftChooser, Reckoned
from services.verifier.draft_options import IdleTrials, Option, Options, tamed
from services.verifier.plain_runs import WARMING, PlainRuns
from services.verifier.scheduler import SequencePlan
from services.verifier.sequence import Sequence as RunningSequence
from services.verifier.step_prices import StepPrices
from speculation.acceptance import Accepted
from speculation.budget import Choice, StepPrice, nodes_that_pay
from speculation.by_load import load_of
from speculation.children import ChildSelection
from speculation.experience import GAIN_MEMORY, RELIABILITY_MEMORY, Reliability
from speculation.guard import Guards
from speculation.merge import MergedDraft, merge_trees
from speculation.step_curve import StepCurve
from speculation.tree import TokenTree

# Every so many drafted steps one verifies all that was asked for one sequence, or its largest tree.
_UNPRUNED_EVERY, _LARGEST_EVERY = 16, 64
# Drafting begins at a load that has lasted for so many steps without prompts. Where some of 8 streams end, 5 decode for
# a step or two until the next ones come: a draft there alone costs more than it brings, since it slows the plain steps
# behind it.
_STEADY_STEPS = 8
# The first steps of a process take up to three times as long as later ones: believed, they would spoil what is known of
# large steps, of drafting and of plain decoding. What was kept of an earlier process is judged all the same.
_COLD_STEPS = 32
# Trials of drafting that does not pay are rare: what the last of them say counts, not what was long ago.
_TRIAL_MEMORY = 8.0
# Steps for which no draft is thought of when none pays, and for how many at most when none has for long: thinking costs
# more than a small model's plain step can bear.
_REST_STEPS, _LONGEST_REST = 8, 64
# Before the first drafts of sequences with more tokens than this together, one plain step goes by, in which speculators
# compute them.
_PREPARED_TOKENS = 32
# Behind the first so many drafts, one in so many teaches, and of the drafted steps one in so many what they cost:
# looking back takes time too.
_ALL_TEACH, _TEACH_EVERY = 128, 8
_ALL_TIMED, _TIMED_EVERY = 256, 4


@dataclass(kw_only=True)
class _Step(Ask):
    """A step's account: what was asked for it, what it was expected to cost and what came."""

    price: StepPrice
    rows: int
    alone: bool  # whether it has no prompt chunks
    plain_before: int  # steps since the last one with drafts
    option: Option | None = None
    fresh: float = 0.0  # tokens of the asked sequences that were new to the drafts
    sampled: bool = False  # whether a sequence has sampled children: what they bring must decide nothing for others
    whole: int | None = None  # the sequence whose tree is not pruned, to learn from it
    promised: float = 1.0  # tokens per second that were expected, for one of a plain step
    equal: float = 0.0  # tokens per second that trees of equal size would have given
    trial: bool = False  # whether one sequence drafts though it does not pay
    answered: bool = False
    depth: int = 0  # sum over sequences
    drafting: float = 0.0  # expected seconds
    expected: float = 0.0  # draft tokens that will be accepted
    candidates: dict[int, Candidate] = field(default_factory=dict)
    drafts: dict[int, MergedDraft] = field(default_factory=dict)
    teaching: list[Wish] = field(default_factory=list)  # of the sequences whose drafts are looked at again

    @property
    def features(self) -> tuple[float, ...]:
        """What the cost of drafting is reckoned from."""
        return (1, len(self.nodes), self.depth, self.fresh)


class MeasuredBudget(DraftBudget[_Step]):
    """Drafts and verifies what makes tokens come fastest, by measured times and measured acceptance."""

    defers_first_drafts = True

    def __init__(self, curve: StepCurve, most_nodes: int, most_depth: int) -> None:
        self._most_depth = most_depth
        self._prices = StepPrices(curve)
        self._options = Options(most_nodes)
        self._guards = Guards(len(self._options.costs))
        self._chooser = DraftChooser(self._options, self._prices, self._guards, most_nodes)
        self._trials = IdleTrials()
        self._reliability = Reliability()
        self._drafted_steps = self._drafts = 0
        self._rest = self._last_rest = 0  # steps
        self._runs = PlainRuns()
        self._load, self._steady = 0, _STEADY_STEPS
        self._learned_steps = 0
        self._drafting = False  # whether the last step that might draft did so because it pays

    @property
    def curve(self) -> StepCurve:
        return self._prices.curve

    @property
    def resting(self) -> bool:
        return self._rest > 0

    def ask(self, plans: Sequence[SequencePlan], wishes: Sequence[Wish]) -> _Step:
        decoding = chunks = 0
        for plan in plans:
            decoding += plan.decodes
            chunks += plan.chunk_end - plan.sequence.cache.length
        reckoned = self._chooser.reckon(decoding, chunks + decoding)
        step = _Step(price=reckoned.price, rows=reckoned.rows, alone=chunks == 0, plain_before=self._runs.in_a_row)
        self._runs.in_a_row += 1
        load = load_of(decoding)
        self._steady = self._steady + 1 if self._load in (0, load) and step.alone else 0
        self._load = load
        if self._rest > 0:
            self._rest -= 1
            self._trials.wait(self._options)
        if wishes and not self._runs.goes_on(decoding):
            self._decide(step, reckoned, wishes)
        if self._drafting:
            self._open(step, [plan.sequence for plan in plans if plan.computes_prompt and plan.sequence.wants_drafts])
        return step

    def _decide(self, step: _Step, reckoned: Reckoned, wishes: Sequence[Wish]) -> None:
        drawn = [wish for wish in wishes if wish.selection is ChildSelection.SAMPLED]
        step.sampled = bool(drawn)
        others = [wish for wish in wishes if wish.selection is not ChildSelection.SAMPLED] if drawn else wishes
        begins = not self._drafting
        may_begin = not begins or self._steady >= _STEADY_STEPS
        choice = self._chooser.choice(reckoned, others, begins=begins) if others and may_begin else None
        sizes = self._chooser.drawn(reckoned, drawn) if drawn else {}
        self._drafting = choice is not None or bool(sizes)
        if not self._drafting:
            self._idle(step, wishes)
            return
        chosen = [] if choice is None else [others[place] for place in choice.chosen]
        drawn = [wish for wish in drawn if wish.id in sizes]
        unknown = [wish for wish in (*chosen, *drawn) if self._chooser.is_unknown(wish)] if begins else []
        if sum([self._chooser.fresh(wish) for wish in unknown]) > _PREPARED_TOKENS:
            self._open(step, [wish.plan.sequence for wish in unknown])
            return
        if choice is not None:
            self._drafted(step, choice, chosen)
        whole = self._options.whole[0]  # what their own gains are of
        if drawn and (step.option is None or step.option is whole):
            self._order(step, whole, [(wish, sizes[wish.id]) for wish in drawn])

    def _open(self, step: _Step, sequences: Sequence[RunningSequence]) -> None:
        step.opening = [*step.opening, *sequences]
        for sequence in sequences:
            self._chooser.told(sequence)

    def _drafted(self, step: _Step, choice: Choice, chosen: Sequence[Wish]) -> None:
        option = self._options.all[choice.option]
        guards = self._guards.at(step.price.tokens)
        # Of sampled children the guards know nothing.
        if not step.sampled and self._runs.begins(step.price.tokens, guards, guards[self._options.way(option)]):
            return
        turn = (self._drafted_steps + 1) % (2 * _LARGEST_EVERY)
        step.equal = choice.rate / choice.sharing
        step.promised = choice.rate * step.price.of(0) / step.price.tokens
        first = chosen[0]
        if turn % _UNPRUNED_EVERY == _UNPRUNED_EVERY // 2:
            step.whole = first.id
        if largest := turn % _LARGEST_EVERY == _LARGEST_EVERY // 2:
            step.whole = first.id
            option = self._options.whole[turn > _LARGEST_EVERY]
        asked = self._options.asked(choice.size, len(chosen))
        self._order(step, option, [(wish, asked) for wish in chosen])
        if largest:
            step.nodes[first.id] = first.plan.draft_nodes

    def _idle(self, step: _Step, wishes: Sequence[Wish]) -> None:
        if not self._guards.at(step.price.tokens)[0].informed:
            return
        wish = min(wishes, key=self._chooser.fresh)
        option = self._trials.due(self._options, step.price, wish.plan.draft_nodes, self._chooser.fresh(wish))
        if option is not None:
            step.trial, step.whole = True, wish.id
            self._order(step, option, [(wish, self._trials.nodes(step.price, wish.plan.draft_nodes))])
        elif not step.sampled:
            self._rest = self._last_rest = min(self._last_rest + _REST_STEPS, _LONGEST_REST)

    def _order(self, step: _Step, option: Option, wanted: Sequence[tuple[Wish, int]]) -> None:
        """wanted: with most nodes of each tree."""
        if step.option is None:
            self._runs.drafts(step.price.tokens)
            step.option, step.models, step.floor = option, option.models, option.floor
            option.cost.idle_steps = 0
            option.cost.measured += 1
            if not step.trial:
                self._drafted_steps += 1
                self._last_rest = 0
        for wish, nodes in wanted:
            step.nodes[wish.id] = min(nodes, wish.plan.draft_nodes)
            step.fresh += self._chooser.fresh(wish)
            self._chooser.told(wish.plan.sequence)

    def merge(
        self, step: _Step, wishes: Sequence[Wish], trees: Mapping[int, list[TokenTree]] | None
    ) -> dict[int, MergedDraft]:
        if step.option is None:
            return step.drafts
        step.answered = trees is not None
        free: dict[int, list[TokenTree]] = {}
        for wish in wishes:
            if wish.id in step.nodes:
                found = (trees or {}).get(wish.id, [])
                if wish.selection is not ChildSelection.SAMPLED:
                    self._may_teach(step, wish)
                    if found:
                        free[wish.id] = found
                elif found:
                    step.depth += max([max(tree.depths()) for tree in found])
                    step.drafts[wish.id] = merge_trees(found, step.nodes[wish.id])
        step.candidates = make_candidates(free, step.nodes, self._reliability)
        step.depth += sum([candidate.deepest for candidate in step.candidates.values()])
        step.drafting = step.option.cost.seconds(step.price.tokens, step.features)
        self._prune(step)
        return step.drafts

    def _may_teach(self, step: _Step, wish: Wish) -> None:
        self._drafts += 1
        if self._drafts <= _ALL_TEACH or self._drafts % _TEACH_EVERY == 0 or step.whole == wish.id:
            step.teaching.append(wish)

    def _prune(self, step: _Step) -> None:
        """Keeps the nodes that pay, of all trees together, and all of a tree that is to be kept whole."""
        for sequence_id, candidate in step.candidates.items():
            if sequence_id == step.whole:
                step.drafts[sequence_id] = candidate.keep(range(len(candidate.tree)))
                step.expected += candidate.expected
        fixed = sum([len(draft.tree) - 1 for draft in step.drafts.values()])
        price = StepPrice(step.price.tokens, step.price.seconds[fixed:] + step.drafting)
        free = {key: candidate for key, candidate in step.candidates.items() if key != step.whole}
        kept, gained = nodes_that_pay([candidate.confidences for candidate in free.values()], price)
        step.expected += gained
        if 1 < len(free) == len(step.nodes):
            reached = (price.tokens + gained) / price.of(sum(map(len, kept)) - len(kept))
            self._chooser.learn_sharing(price.tokens, reached / step.equal)
        for (sequence_id, candidate), nodes in zip(free.items(), kept, strict=True):
            if len(nodes) > 1:
                step.drafts[sequence_id] = candidate.keep(nodes)

    def learn(self, step: _Step, accepted: Mapping[int, Accepted], draft_seconds: float, step_seconds: float) -> None:
        self._learned_steps += 1
        if step.option is None:
            if step.alone and step.price.tokens and not step.opening and step.plain_before:
                self._learn_plain(step, draft_seconds + step_seconds)
        elif step.answered:
            self._learn_acceptance(step, step.option, accepted)
            if step.alone:  # what a prompt takes beside drafts tells nothing of either
                self._learn_times(step, step.option, accepted, draft_seconds, step_seconds)

    @property
    def _cold(self) -> bool:
        return self._learned_steps <= _COLD_STEPS

    def _learn_plain(self, step: _Step, seconds: float) -> None:
        guards, yardstick = self._guards.at(step.price.tokens), self._prices.yardstick.seconds(step.rows)
        in_a_row = step.plain_before >= WARMING
        if not self._cold and (in_a_row or not guards[0].knows_a_row):
            self._prices.learn_plain(step.rows, step.price.tokens, seconds, step.price.of(0))
        if not guards[0].informed:
            self._chooser.reckon_anew()
        for guard in guards:
            if not self._cold or guard.accused:
                guard.plain(seconds, yardstick, in_a_row=in_a_row)

    def _learn_acceptance(self, step: _Step, option: Option, accepted: Mapping[int, Accepted]) -> None:
        for wish in step.teaching:
            candidate = step.candidates.get(wish.id)
            if candidate is not None and (draft := step.drafts.get(wish.id)) is not None:
                memory = _TRIAL_MEMORY if step.trial else RELIABILITY_MEMORY
                candidate.teach(self._reliability, draft, accepted[wish.id], memory)
            if wish.plan.draft_depth == self._most_depth:
                memory = _TRIAL_MEMORY if step.trial else GAIN_MEMORY
                self._options.learn(option, wish.selection, candidate, step.nodes[wish.id], memory)
        for sequence_id in step.nodes.keys() & self._chooser.own_gains.keys():
            accepted_nodes = [1.0] * len(accepted[sequence_id].nodes)
            self._chooser.own_gains[sequence_id].learn(accepted_nodes, step.nodes[sequence_id])

    def _learn_times(
        self, step: _Step, option: Option, accepted: Mapping[int, Accepted], draft_seconds: float, step_seconds: float
    ) -> None:
        """Whatever a drafted step costs beyond the price of its rows counts as the cost of drafting."""
        added = sum([len(draft.tree) - 1 for draft in step.drafts.values()])
        verifying, sequences = step.price.of(added), step.price.tokens
        seconds = tamed(draft_seconds + step_seconds, step.drafting + verifying)
        timed = step.trial or self._drafted_steps <= _ALL_TIMED or self._drafted_steps % _TIMED_EVERY == 0
        if timed and not self._cold:
            option.cost.learn(sequences, step.features, seconds - verifying, step.drafting)
            if added:
                self._prices.learn_drafted(step.rows + added, sequences, step_seconds)
        if step.trial:
            self._chooser.reckon_anew()
        elif not step.sampled:
            came = sum([len(path.token_ids) for path in accepted.values()])
            guards = self._guards.at(sequences)
            guard = guards[self._options.way(option)]
            for other in guards:
                if other is not guard:
                    other.passed()
            guard.drafted(
                came,
                sequences + step.expected,
                sequences,
                seconds=seconds,
                yardstick=self._prices.yardstick.seconds(step.rows),
                promised=step.promised,
            )

    def forget(self, sequence_id: int) -> None:
        self._chooser.forget(sequence_id)

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON. From any thread: what changes meanwhile is copied before or after."""
        parts = self._prices.state() | self._options.state()
        parts |= {"reliability": self._reliability.state(), "guards": self._guards.state()}
        return parts | {"sharing": self._chooser.state(), "steps": self._drafted_steps, "drafts": self._drafts}

    def restore(self, state: dict[str, Any], share: float) -> None:
        """Take an earlier budget's knowledge over, with a share of its weight, so that a change is noticed soon. What
        the first steps and drafts alone are asked for is not asked for again.

        Raises KeyError, TypeError, ValueError or AttributeError when it is of another form.
        """
        self._prices.restore(state, share)
        self._options.restore(state, share)
        self._reliability.restore(state["reliability"], share)
        self._guards.restore(state["guards"], share)
        self._chooser.restore(state["sharing"], share)
        self._drafted_steps, self._drafts = int(state["steps"]), int(state["drafts"])
