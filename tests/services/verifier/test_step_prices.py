"""What a step is thought to cost."""

from __future__ import annotations

import numpy as np
import pytest

from services.verifier.step_prices import StepPrices
from speculation.step_curve import StepCurve


def linear(rows: int) -> float:
    """Cheaper rows behind the 64th."""
    return 0.002 + 0.0004 * min(rows, 64) + 0.0001 * max(0, rows - 64)


@pytest.fixture
def prices() -> StepPrices:
    return StepPrices(StepCurve({rows: linear(rows) for rows in (1, 64, 512)}))


def test_a_step_of_trees_alone(prices: StepPrices) -> None:
    price = prices.price(rows=8, decoding=8, most_nodes=40)
    assert price.tokens == 8
    assert price.seconds == pytest.approx([linear(8 + nodes) for nodes in range(41)])


def test_what_prompts_take_makes_no_draft_worth_its_time(prices: StepPrices) -> None:
    """A node beside a prompt costs what its row adds there, against tokens at the rate of other steps."""
    price = prices.price(rows=108, decoding=8, most_nodes=40)
    assert price.of(0) == pytest.approx(linear(8))
    assert np.diff(price.seconds) == pytest.approx([0.0001] * 40)


def test_a_step_of_prompts_alone(prices: StepPrices) -> None:
    assert prices.price(rows=100, decoding=0, most_nodes=0).tokens == 0


def test_plain_steps_tell_what_the_curve_leaves_out(prices: StepPrices) -> None:
    for _ in range(40):
        prices.learn_plain(8, 8, linear(8) + 0.001, believed=linear(8) + 0.001)
    assert prices.price(8, 8, 0).of(0) == pytest.approx(linear(8) + 0.001, rel=0.05)
