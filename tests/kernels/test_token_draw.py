"""Native draws against the noise and the rule of speculation."""

from __future__ import annotations

import pytest
import torch

from kernels.token_draw.native import draw_tokens
from speculation.noise import gumbel_noise

TEMPERATURES = [1e-20, 0.3, 1.0, 2.5]


@pytest.mark.parametrize("vocab", [1, 5, 8, 33, 4096])
def test_every_draw_is_the_references(vocab: int) -> None:
    """Among the tokens whose perturbed score is the highest up to rounding; nearly always the same one."""
    logits = 3 * torch.randn(len(TEMPERATURES), vocab, generator=torch.Generator().manual_seed(vocab))
    draws = [(row, seed, seed % 1000 + row) for row in range(len(TEMPERATURES)) for seed in (0, 3, 2**63, 2**64 - 1)]
    rows, seeds, positions = (list(column) for column in zip(*draws, strict=True))
    tokens = draw_tokens(logits, rows, [TEMPERATURES[row] for row in rows], seeds, positions)
    same = 0
    for token, (row, seed, position) in zip(tokens, draws, strict=True):
        scores = (logits[row].double() / TEMPERATURES[row]).log_softmax(-1) + gumbel_noise(seed, position, vocab)
        assert scores[token] >= scores.max() - 1e-5
        same += token == int(scores.argmax())
    assert same >= len(draws) - 1


def test_a_draw_depends_on_its_row_seed_and_position_alone() -> None:
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    alone = [draw_tokens(logits, [row], [0.8], [row + 1], [row + 40])[0] for row in range(6)]
    order = [4, 0, 5, 5, 2, 1, 3]
    together = draw_tokens(logits, order, [0.8] * 7, [row + 1 for row in order], [row + 40 for row in order])
    assert together == [alone[row] for row in order]
    assert draw_tokens(logits, [], [], [], []) == []


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    count = 20_000
    drawn = draw_tokens(logits, [0] * count, [1.0] * count, [11] * count, list(range(count)))
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / count
    # five standard deviations of a share are at most 5 / (2 sqrt(count)) = 0.018
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.018, rtol=0)
    assert shares[3] == 0


def test_wrong_rows_and_temperatures_are_refused() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(IndexError, match=r"rows are 0\.\.2; logits has 2"):
        draw_tokens(logits, [0, 2], [1.0, 1.0], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="a temperature is 0"):
        draw_tokens(logits, [0], [0], [0], [0])
