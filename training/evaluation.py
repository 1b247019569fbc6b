"""What a small model is worth as a draft, measured on held-out continuations, and its calibration.

Both models run as they are served, in the project's own runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.batch import Segment
from runtime.kv_cache import BLOCK_SIZE, CachedSequence, KVCache
from runtime.transformer import Transformer
from speculation.calibration import Calibration
from speculation.noise import gumbel_noise
from training.continuations import Continuation

WIDTH = 5  # children of a node that are looked at
BINS = 10
# Candidates for a temperature, from 1/5 to 5 in steps of a twentieth of an octave.
GRID = [2 ** (step / 20) for step in range(-46, 47)]
NOISE_SEED = 1


@dataclass
class Reliability:
    """Estimated probabilities against what came true, in BINS bins of the estimate (Guo et al., 2017, section 2)."""

    count: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    estimated: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    true: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, estimates: torch.Tensor, true: torch.Tensor) -> None:
        """estimates: float [n], probabilities. true: bool [n]."""
        estimates, true = estimates.flatten().double().cpu(), true.flatten().double().cpu()
        bins = (estimates * BINS).long().clamp(0, BINS - 1)
        self.count.index_add_(0, bins, torch.ones_like(estimates))
        self.estimated.index_add_(0, bins, estimates)
        self.true.index_add_(0, bins, true)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over all estimates of |estimated - true| of their bin."""
        return float((self.estimated - self.true).abs().sum() / self.count.sum())

    def table(self) -> list[dict[str, float]]:
        """One row for each bin that has estimates."""
        rows = zip(self.count.tolist(), self.estimated.tolist(), self.true.tolist(), strict=True)
        return [
            {"count": int(count), "estimated": round(estimated / count, 4), "true": round(true / count, 4)}
            for count, estimated, true in rows
            if count
        ]


def _no_hits() -> torch.Tensor:
    return torch.zeros(WIDTH, dtype=torch.float64)


@dataclass
class HeldOut:
    """Figures of one small model.

    greedy_hits: at how many positions the LLM's first choice is among the model's k first, for k = 1..WIDTH.
    noise_hits: the same for the LLM's draws and the model's candidates, ranked with the same noise.
    overlaps: sum over positions of 1 - TV(p, q), the chance that one child drawn from q is accepted at temperature 1.
    *_reliability: of the calibrated estimates, where the fit has not seen them; raw_*: of the scores as they are.
    """

    calibration: Calibration
    positions: int = 0
    greedy_hits: torch.Tensor = field(default_factory=_no_hits)
    noise_hits: torch.Tensor = field(default_factory=_no_hits)
    overlaps: float = 0.0
    greedy_reliability: Reliability = field(default_factory=Reliability)
    noise_reliability: Reliability = field(default_factory=Reliability)
    raw_greedy: Reliability = field(default_factory=Reliability)
    raw_noise: Reliability = field(default_factory=Reliability)

    @property
    def greedy(self) -> list[float]:
        """Success rates for k = 1..WIDTH."""
        shares: list[float] = (self.greedy_hits / self.positions).tolist()
        return shares

    @property
    def shared_noise(self) -> list[float]:
        shares: list[float] = (self.noise_hits / self.positions).tolist()
        return shares

    @property
    def overlap(self) -> float:
        return self.overlaps / self.positions

    def measurements(self) -> dict[str, Any]:
        """What `speculation.json` says of the calibration."""
        return {
            "positions": self.positions,
            "expected_calibration_error": {
                "greedy": _before_and_after(self.raw_greedy, self.greedy_reliability),
                "shared_noise": _before_and_after(self.raw_noise, self.noise_reliability),
            },
            "greedy_reliability": self.greedy_reliability.table(),
            "shared_noise_reliability": self.noise_reliability.table(),
        }


def _before_and_after(raw: Reliability, calibrated: Reliability) -> dict[str, float]:
    return {"raw": round(raw.error, 4), "calibrated": round(calibrated.error, 4)}


@dataclass(frozen=True)
class _Positions:
    """The positions of one continuation. log_p, log_q: float32 [new, vocab] of LLM and model. noise: the draws' own."""

    log_p: torch.Tensor
    log_q: torch.Tensor
    noise: torch.Tensor

    @property
    def greedy_token(self) -> torch.Tensor:
        return self.log_p.argmax(-1, keepdim=True)

    @property
    def drawn_token(self) -> torch.Tensor:
        return (self.log_p + self.noise).argmax(-1, keepdim=True)

    @property
    def noisy(self) -> torch.Tensor:
        return self.log_q + self.noise


def evaluate(llm: Transformer, ssm: Transformer, continuations: Sequence[Continuation]) -> HeldOut:
    """Fit the calibration on the first half of the continuations, measure it on the other, and all else on all."""
    half = max(1, len(continuations) // 2)
    fitted, unseen = continuations[:half], continuations[half:] or continuations
    calibration = Calibration(
        greedy_temperature=_best_of_grid(llm, ssm, fitted, lambda at: (at.log_q, at.greedy_token)),
        disagreement=_best_of_grid(llm, ssm, fitted, lambda at: (at.noisy, at.drawn_token)),
    )
    figures = HeldOut(calibration=calibration)
    for at in _positions(llm, ssm, unseen):
        for scores, token, scale, raw, calibrated in (
            (at.log_q, at.greedy_token, calibration.greedy_temperature, figures.raw_greedy, figures.greedy_reliability),
            (at.noisy, at.drawn_token, calibration.disagreement, figures.raw_noise, figures.noise_reliability),
        ):
            best = scores.topk(WIDTH).indices
            raw.add(scores.softmax(-1).gather(-1, best), best == token)
            calibrated.add((scores / scale).softmax(-1).gather(-1, best), best == token)
    for at in _positions(llm, ssm, continuations):
        figures.positions += len(at.log_p)
        figures.overlaps += float(torch.minimum(at.log_p.exp(), at.log_q.exp()).sum())
        figures.greedy_hits += _hits_by_rank(at.log_q, at.greedy_token)
        figures.noise_hits += _hits_by_rank(at.noisy, at.drawn_token)
    return figures


def _hits_by_rank(scores: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """How often the token is among the k highest scores, for k = 1..WIDTH; float64 [WIDTH]."""
    return (scores.topk(WIDTH).indices == token).sum(0).double().cumsum(0).cpu()


def _best_of_grid(
    llm: Transformer,
    ssm: Transformer,
    continuations: Sequence[Continuation],
    outcome: Callable[[_Positions], tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """The scale s under which softmax(scores / s) gives the tokens that came true the highest likelihood."""
    losses = torch.zeros(len(GRID), dtype=torch.float64)
    for at in _positions(llm, ssm, continuations):
        scores, token = outcome(at)
        right = scores.gather(-1, token)[:, 0]
        for index, scale in enumerate(GRID):
            losses[index] += float(((scores / scale).logsumexp(-1) - right / scale).sum(dtype=torch.float64))
    return round(GRID[int(losses.argmin())], 4)


def _positions(llm: Transformer, ssm: Transformer, continuations: Sequence[Continuation]) -> Iterator[_Positions]:
    for continuation in continuations:
        log_p, log_q = _log_probs(llm, continuation), _log_probs(ssm, continuation)
        positions = range(continuation.prompt_length, len(continuation.tokens))
        noise = gumbel_noise(NOISE_SEED, list(positions), log_p.shape[1], log_p.device).float()
        yield _Positions(log_p, log_q, noise)


@torch.inference_mode()
def _log_probs(model: Transformer, continuation: Continuation) -> torch.Tensor:
    """Log-probabilities before each new token, float32 [new, vocab]."""
    tokens = continuation.tokens[:-1].tolist()
    cache = KVCache(model.config, -(-len(tokens) // BLOCK_SIZE), model.device, model.kv_dtype)
    sequence = CachedSequence()
    cache.reserve(sequence, len(tokens))
    wanted = range(continuation.prompt_length - 1, len(tokens))
    return model.step([Segment.chain(sequence, tokens, 0)], wanted, cache).log_softmax(-1)
