"""What the gateway asks of a verifier and gets back, in the gateway's own terms. Knows neither protobuf nor HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields and bounds of `CompletionRequest`, the seed as an unsigned 64-bit number."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate: one choice of a completion.

    model: the model that it is for; another one must not go on with it.
    top_logprobs: None for no report; else how many of the most likely tokens to report besides the chosen one.
    speculative: whether drafts may be made for it; changes its speed, never its tokens.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    speculative: bool = True


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token and the (token id, log-probability) of the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the LLM added to a sequence.

    logprobs: one for each token, or empty when none were asked for.
    prompt_logprobs: entry i is for prompt token i + 1; in the first step only.
    llm_steps: steps that the sequence took part in so far.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    llm_steps: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """What a verifier says of its model."""

    model: str
    vocab_size: int
    context_length: int
    tokenizer_hash: str
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    kernels: str


class VerifierError(Exception):
    """A call to the verifier failed; the message is fit for the client."""


class VerifierUnavailable(VerifierError):
    """It cannot be reached, is draining, or was lost in the middle of a call."""


class VerifierBusy(VerifierError):
    """Its queue is full."""

    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class VerifierRefused(VerifierError):
    """The request can never run."""


class VerifierFailed(VerifierError):
    """Anything else: a fault of the verifier, or an answer that breaks the protocol."""


class ModelMismatch(VerifierError):
    """The verifier's tokenizer is not the gateway's."""
