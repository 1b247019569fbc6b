"""Ratios of sums over prompts, and how far other prompts would move them: a bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """A ratio of two figures, with the bounds of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Ratio:
    """Sum of the numerators over sum of the denominators; both float64 [prompts]."""

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        return cls(np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64))

    @property
    def value(self) -> float:
        return float(self.numerators.sum() / self.denominators.sum())

    @property
    def error(self) -> float:
        """Standard error."""
        return float(self.resampled.std())

    @cached_property
    def resampled(self) -> np.ndarray:
        """The ratio for each of RESAMPLES draws of as many prompts; all ratios of as many prompts share the draws."""
        drawn = _draws(len(self.numerators))
        return np.asarray(self.numerators[drawn].sum(1) / self.denominators[drawn].sum(1))

    def over(self, other: Ratio) -> Comparison:
        """This figure over another of the same prompts; the interval is of pairs, so that hard prompts cancel.

        Over a figure of zero it is infinite, or 1 when both are zero.
        """
        ratios = _quotients(self.resampled, other.resampled)
        low, high = np.percentile(ratios, [2.5, 97.5], method="inverted_cdf")  # infinite ones do not interpolate
        value = _quotients(np.array([self.value]), np.array([other.value]))[0]
        return Comparison(float(value), float(low), float(high))


def _quotients(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    quotients = np.where(above > 0, np.inf, 1.0)
    np.divide(above, below, out=quotients, where=below > 0)
    return quotients


@lru_cache
def _draws(prompts: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))
