"""The request's sampling parameters, as every service understands them. The gateway validates; here are the bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the model's logits; the fields are applied in this order.

    logit_bias: added to the logits, by token id.
    repetition_penalty: > 1 makes tokens of prompt and output less likely (Keskar et al., 2019); 1 is off.
    frequency_penalty: subtracted once for each occurrence of the token in the output.
    presence_penalty: subtracted when the token is in the output.
    temperature: 0 is greedy decoding.
    top_k: keep the k most likely tokens; 0 is off.
    top_p: keep the smallest set of most likely tokens with at least this probability.
    min_p: keep tokens at least this fraction as likely as the most likely one.
    seed: fixes the noise of every position.

    Raises:
        ValueError: a field outside its bounds; the message names it, the value and the bounds.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "repetition_penalty": (1e-3, 1e3),
            "frequency_penalty": (-2, 2),
            "presence_penalty": (-2, 2),
            "temperature": (0, 100),
            "top_k": (0, 2**31 - 1),
            "top_p": (1e-9, 1),
            "min_p": (0, 1),
            "seed": (0, 2**64 - 1),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:  # also refuses NaN
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in {low}..{high}")
        for token_id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token_id} is {bias}; it must be in -100..100")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_context(self) -> bool:
        """Whether the tokens so far change the next token's scores."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)
