"""Which tokens become the children of a node, and how sure the draft is of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from speculation.calibration import Calibration, check_scale
from speculation.noise import derive_seed, gumbel_noise
from speculation.sampling import SamplingParams


class ChildSelection(StrEnum):
    """How the children of a node are chosen.

    TOP: the most likely tokens.
    SHARED_NOISE: the most likely ones after adding the noise that the verifier will add.
    SAMPLED: drawn without replacement; the distributions that they were drawn from are kept.
    """

    TOP = "top"
    SHARED_NOISE = "shared-noise"
    SAMPLED = "sampled"


@dataclass(frozen=True)
class ChildPolicy:
    """How a builder chooses children, and how sure it is of them.

    seed: the request's.
    stream: SAMPLED only; keeps the draws apart of models whose trees are merged. Two models of one request must not
        share it: their draws would depend on each other and bias multi-step speculative sampling.
    temperature: TOP only; divides the log-probabilities of which confidences are made.
    disagreement: the other selections; typical scale of log p - log q between the LLM and the small model.

    The last two turn scores into confidences (see Calibration): they steer the shape of trees, never the output nor the
    order of a node's children.

    Raises:
        InvalidCalibration: temperature or disagreement outside 0.01..100.
    """

    selection: ChildSelection
    seed: int = 0
    stream: int = 0
    temperature: float = 1.0
    disagreement: float = 0.4

    def __post_init__(self) -> None:
        check_scale("temperature", self.temperature)
        check_scale("disagreement", self.disagreement)

    @classmethod
    def calibrated(
        cls, selection: ChildSelection, params: SamplingParams, stream: int, calibration: Calibration
    ) -> ChildPolicy:
        """The policy for a request, with the scales of the model that drafts.

        The naive rule accepts a child with the LLM's own probability of it, which the model's stands for as it is.
        """
        temperature = calibration.greedy_temperature if params.greedy else 1.0
        return cls(selection, params.seed, stream, temperature, calibration.disagreement)


def rank_children(policy: ChildPolicy, log_probs: torch.Tensor, position: int, width: int) -> torch.Tensor:
    """The `width` first children of each row of log_probs [n, vocab], best or drawn first, and their confidences.

    Returns float64 [2, n, width], token ids and confidences, on the device of log_probs: one tensor, one copy back.

    A confidence is the log of the estimated probability that the child is the token that will be accepted, given that
    its parent is; -inf where the row has no such child. In every row they fall.
    """
    scores = log_probs
    if policy.selection is ChildSelection.SHARED_NOISE:
        scores = log_probs + gumbel_noise(policy.seed, position, log_probs.shape[1], log_probs.device)
    elif policy.selection is ChildSelection.SAMPLED:
        # The largest values of log q + Gumbel noise, in order, are draws from q without replacement.
        seed = derive_seed(policy.seed, 1 + policy.stream)
        scores = log_probs + gumbel_noise(seed, position, log_probs.shape[1], log_probs.device)
    best = scores.topk(width)
    if policy.selection is ChildSelection.SAMPLED:
        confidences = _draw_confidences(policy, log_probs, best.values)
    elif policy.selection is ChildSelection.SHARED_NOISE:
        confidences = _softened(scores, best.values, policy.disagreement)
    elif policy.temperature != 1:
        confidences = _softened(scores, best.values, policy.temperature)
    else:
        confidences = best.values  # normalised as they are
    return torch.stack((best.indices.double(), confidences.double()))


def _softened(scores: torch.Tensor, best: torch.Tensor, scale: float) -> torch.Tensor:
    """log softmax(scores / scale) of the best of each row: [n, width] for scores [n, vocab] and best [n, width]."""
    return best / scale - (scores / scale).logsumexp(-1, keepdim=True)


def _draw_confidences(policy: ChildPolicy, log_probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Confidences [n, width] of drawn children: by rank, since they must not depend on the tokens drawn.

    draws: the perturbed log-probabilities of the draws [n, width]; only their being -inf is used, which says that the
        distribution has fewer tokens than the width, whatever was drawn.
    """
    # The first draw is accepted with probability 1 - TV(p, q) (SpecInfer, section 4.3). If log p - log q is Gumbel
    # noise of scale b <= 1, TV is about 0.6 b (1 - sum q^2); of what it leaves, later draws get about 1/4, 1/8, ..
    rejected = (1 - log_probs.exp().square().sum(-1, keepdim=True)).clamp(min=0) * min(0.6 * policy.disagreement, 0.6)
    shares = torch.full((draws.shape[1],), 0.5, device=draws.device).cumprod(0) / 2
    confidences = (rejected * shares).log()
    confidences[:, 0] = (1 - rejected[:, 0]).log()
    return confidences.masked_fill(draws == -torch.inf, -torch.inf)
