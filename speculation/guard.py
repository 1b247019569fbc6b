"""Whether drafting keeps what it promises: drafted steps against plain ones, by the clock alone.

The choice of how much to draft rests on models of cost and gain. They can be wrong in ways that they cannot see, so
there is an account in plain steps: each drafted step adds what it gained and takes what it lost. Drafting is given up
where it has lost a small allowance, or gains nothing in the long run; for so long that what was lost is a small share
of the time, and longer each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from speculation.by_load import ByLoad

_PLAIN_STEPS = 8  # plain steps that must be known before any draft, and that are remembered
# A gain below this is within what the models are wrong by.
_LEAST_GAIN = 1.02
# What drafting costs outside of drafted steps, as a share of these, for each sequence and at most: speculators compute
# prompts, answers end farther apart. With half as much, sampled text came 3% slower with 16 streams, 5% with 32.
_UNSEEN, _MOST_UNSEEN = 0.002, 0.07
# In so many steps of a trial more is hoped for than is thought: what was learned at other loads, or of one sequence's
# drafts, may be wrong of many, and what is not tried is not corrected. What it may lose is bounded all the same.
_HOPEFUL_STEPS, _HOPE = 32, 1.5
# What drafting may lose, in plain steps: so much, and so much more for a single sequence, whose steps say little.
_ALLOWANCE, _ALLOWANCE_OF_ONE = 1.0, 2.0
# Gains are not saved up beyond this, so that a change for the worse is noticed.
_MOST_SAVED = 4.0
# Steps behind which the mean gain counts too, and that it is the mean of; and those that are heard before giving up.
_LONG_RUN, _RECENT = 64, 16
# Weight of what was expected against what came: that of so many sequences' steps, but never less than a share.
_PRIOR_SEQUENCES, _LEAST_WEIGHT = 2.0, 0.1
# What a change from plain to drafted steps costs behind them, in plain steps: some twenty are slower, by a tenth in the
# beginning, while the LLM's weights come back to the cache that others have filled.
AFTERMATH = 1.0
# Drafted steps in which that must come back.
_STAYING_STEPS = 64
# Share of the time that trials may lose after the first failure; each further one halves it.
_SHARE, _MOST_HALVINGS = 0.005, 4


def _unseen(sequences: int) -> float:
    return min(_UNSEEN * sequences, _MOST_UNSEEN)


class Guard:
    """Of one way to draft at one load, which is a range of how many sequences decode.

    Steps are measured against a yardstick, seconds by their size, so that the range may be wide: one that no learning
    changes, since plain and drafted steps are compared that lie far apart. Before drafting is given up, plain steps are
    measured anew: what looks like its loss may be a machine that has become slower. Plain steps between drafted ones
    are slower than those in a row, which drafting keeps from happening: only the latter count, once there are any.
    """

    def __init__(self, *, hopeful: bool) -> None:
        self._hopeful = hopeful
        self._plain, self._plain_steps, self._in_a_row = 0.0, 0, False
        self._account = self._mean = 0.0
        self._steps = self._sequences = 0  # drafted since the trial began
        # Means of the last ones: tokens for one of a plain step, those that were promised for the time, plain steps.
        self._brought = self._promised = self._took = 0.0
        self._unseen = 0.0  # of the last step
        self._accused = 0.0  # plain steps that seem to be lost, while plain ones are measured
        self._failures = 0
        self._pause = 0.0  # plain steps

    @property
    def steps(self) -> int:
        """Drafted ones since the trial began."""
        return self._steps

    @property
    def known(self) -> int:
        """Steps that are, plain or drafted since the trial began."""
        return self._plain_steps + self._steps

    @property
    def hope(self) -> float:
        """What accepted tokens that are thought to come are to be taken times.

        Drafting that gains more than was promised goes on where the promise alone would end it.
        """
        if self._hopeful and self._steps < _HOPEFUL_STEPS:
            return _HOPE
        return min(max(self._brought / self._promised, 1.0), _HOPE) if self._promised else 1.0

    @property
    def gain(self) -> float:
        """Tokens per second of the last drafted steps, times those of plain ones; 1 before there were any."""
        return self._brought * self._plain / self._took if self._took else 1.0

    @property
    def ready(self) -> bool:
        """Whether plain steps are known and no pause is left."""
        return self.informed and self._pause <= 0

    @property
    def informed(self) -> bool:
        """Whether enough plain steps are known, if only such between drafted ones."""
        return self._plain_steps >= _PLAIN_STEPS

    @property
    def knows_a_row(self) -> bool:
        """Whether they are of plain steps in a row."""
        return self._in_a_row

    @property
    def accused(self) -> bool:
        """Whether it seems to lose, and plain steps must be measured anew before that is believed."""
        return self._accused > 0

    def passed(self) -> None:
        """A step went by that drafted in another way."""
        self._pause -= 1

    def plain(self, seconds: float, yardstick: float, *, in_a_row: bool) -> None:
        """A plain step took so long; by the yardstick it takes `yardstick`."""
        self._pause -= 1
        if self._in_a_row and not in_a_row:
            return
        if in_a_row and not self._in_a_row:
            self._in_a_row, self._plain_steps = True, 0
        self._plain_steps += 1
        self._plain += (seconds / yardstick - self._plain) / min(self._plain_steps, _PLAIN_STEPS)
        if self._accused and self.informed:
            self._judge()

    def drafted(
        self, tokens: int, expected: float, sequences: int, *, seconds: float, yardstick: float, promised: float
    ) -> None:
        """A drafted step gave `tokens` tokens, of which `expected` were expected; a plain one gives `sequences`.

        yardstick: seconds of the plain step. promised: the gain in tokens per second for which it was chosen.
        In the first steps of a trial what was expected counts more: what comes of a few trees varies widely.
        """
        self._steps += 1
        self._sequences += sequences
        weight = max(_LEAST_WEIGHT, _PRIOR_SEQUENCES / (_PRIOR_SEQUENCES + self._sequences))
        brought, took = (tokens + weight * (expected - tokens)) / sequences, seconds / yardstick
        self._brought += (brought - self._brought) / min(self._steps, _RECENT)
        self._took += (took - self._took) / min(self._steps, _RECENT)
        self._promised += (promised * took / self._plain - self._promised) / min(self._steps, _RECENT)
        self._unseen = _unseen(sequences)
        gained = brought - (1 + self._unseen) * took / self._plain
        self._account = min(self._account + gained, _MOST_SAVED)
        self._mean += (gained - self._mean) / min(self._steps, _LONG_RUN)
        allowance = _ALLOWANCE + _ALLOWANCE_OF_ONE / (sequences if self._failures else 1)
        if self._account < -allowance or (self._steps >= _LONG_RUN and self._mean < 0):
            self._accused, self._plain_steps = max(-self._account, allowance), 0
        elif self._steps >= 2 * _LONG_RUN:
            self._failures = 0

    def _judge(self) -> None:
        lost, self._accused = self._accused, 0.0
        gained = self._brought - (1 + self._unseen) * self._took / self._plain
        if gained > 0:
            self._account, self._mean = 0.0, gained
        else:
            self._give_up(lost)

    def _give_up(self, lost: float) -> None:
        self._pause = (lost + AFTERMATH) * 2.0 ** min(self._failures, _MOST_HALVINGS) / _SHARE
        self._failures += 1
        self._account = self._mean = 0.0
        self._steps = self._sequences = 0

    def state(self) -> Sequence[float]:
        plain = [self._plain, self._plain_steps, self._in_a_row]
        return [*plain, self._account, self._mean, self._steps, self._failures, self._pause]

    def restore(self, state: Sequence[float], share: float) -> None:
        """The trial goes on, without the hope of its first steps where they are over. Where the machine has changed,
        drafting will seem to lose, and plain steps are measured anew before it is given up.

        Raises ValueError or TypeError when it is of another form.
        """
        plain, plain_steps, in_a_row, account, mean, steps, failures, pause = state
        self._plain, self._plain_steps, self._in_a_row = float(plain), int(plain_steps), bool(in_a_row)
        self._account, self._mean, self._pause = share * account, float(mean), share * pause
        self._steps, self._failures = min(int(steps), _LONG_RUN), int(failures)


class Guards:
    """One for each way to draft at each load.

    ways: how many ways are told apart.
    """

    def __init__(self, ways: int) -> None:
        self._guards = ByLoad(lambda many: [Guard(hopeful=many) for _ in range(ways)])

    def at(self, sequences: int) -> list[Guard]:
        """By way."""
        return self._guards.at(sequences)

    def allow(self, sequences: int, way: int, gain: float, *, begins: bool) -> bool:
        """Whether the next step may draft, thought to give `gain` times the tokens per second of a plain one.

        begins: behind a plain step.
        """
        least = _LEAST_GAIN + _unseen(sequences) + begins * AFTERMATH / _STAYING_STEPS
        return self.at(sequences)[way].ready and gain >= least

    def state(self) -> dict[str, Sequence[Sequence[float]]]:
        return {load: [guard.state() for guard in guards] for load, guards in self._guards.items()}

    def restore(self, state: Mapping[str, Sequence[Sequence[float]]], share: float) -> None:
        for guards, kept in self._guards.kept(state):
            for guard, own in zip(guards, kept, strict=True):
                guard.restore(own, share)
