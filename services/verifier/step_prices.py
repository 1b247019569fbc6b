"""What a step will take, by its rows and by how many sequences decode, learned from what steps took."""

from __future__ import annotations

from typing import Any

from services.verifier.draft_options import tamed
from speculation.budget import StepPrice
from speculation.experience import LinearFit
from speculation.step_curve import StepCurve

# Plain steps that are remembered: few, as they are rare and a slow minute must be over soon.
_OVERHEAD_MEMORY = 24.0


class StepPrices:
    """The curve by rows, and what it leaves out: milliseconds of a step, and of a sequence, whose tokens are sent.

    yardstick: the curve as it was at first.
    """

    def __init__(self, curve: StepCurve) -> None:
        self.curve = curve
        self.yardstick = StepCurve(curve.points)
        self._overhead = LinearFit((0.0, 0.0), (1, 1), _OVERHEAD_MEMORY)

    def price(self, rows: int, decoding: int, most_nodes: int) -> StepPrice:
        """rows: without drafts, those of prompts among them. most_nodes: of all drafts together.

        What prompts take is no part of it. They must be computed anyway: in a long step tokens come slowly with drafts
        and without, and those that drafts add must come as fast as in any other step to be worth their time.
        """
        table = self.curve.table(rows + most_nodes)
        curve = table[rows : rows + most_nodes + 1] - (table[rows] - table[decoding])
        self._overhead.solve()
        overhead = max(self._overhead.predict((1, decoding)) / 1000, -0.95 * float(curve[0]))
        return StepPrice(decoding, curve + overhead)

    def learn_plain(self, rows: int, decoding: int, seconds: float, believed: float) -> None:
        """A plain step tells what the curve leaves out."""
        beyond = tamed(seconds, believed) - self.curve.seconds(rows)
        self._overhead.observe((1, decoding), 1000 * beyond)

    def learn_drafted(self, rows: int, decoding: int, seconds: float) -> None:
        """A drafted one tells, beyond that, what its rows cost."""
        overhead = self._overhead.predict((1, decoding)) / 1000
        self.curve.observe(rows, max(seconds - overhead, seconds / 4))

    def state(self) -> dict[str, Any]:
        return {"curve": self.curve.points, "yardstick": self.yardstick.points, "overhead": self._overhead.state()}

    def restore(self, state: dict[str, Any], share: float) -> None:
        self.curve, self.yardstick = (
            StepCurve({int(rows): float(seconds) for rows, seconds in state[name].items()})
            for name in ("curve", "yardstick")
        )
        self._overhead.restore(state["overhead"], share)
