"""Tests of distributions with a stated error rate. Seeds are fixed, so that a result never changes by chance."""

from __future__ import annotations

import numpy as np
from scipy import stats

ALPHA = 1e-4
"""Probability that a correct distribution is called wrong, for one test."""


def chi_square_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """P-value of observed counts against exact probabilities of the same shape.

    Cells of which fewer than 5 are expected are pooled. Anything counted in a cell of probability 0 gives 0.
    """
    counts, expected = counts.ravel(), probabilities.ravel() / probabilities.sum() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    filled = expected > 0
    return float(stats.chisquare(observed[filled], expected[filled]).pvalue)
