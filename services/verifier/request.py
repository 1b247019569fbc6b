"""What the verifier is asked for and what it gives back, without protobuf."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from speculation.sampling import SamplingParams


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


class InvalidRequest(ValueError):
    """A request that can never run; the message says what was given and what is allowed."""


class QueueFull(RuntimeError):
    """Too many requests wait; `retry_after_ms` estimates when a place is free."""

    def __init__(self, waiting: int, retry_after_ms: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms


class EngineStopped(RuntimeError):
    """The verifier stops before a sequence has ended; another one, or this one restarted, can go on with its tokens."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate.

    generated: tokens that an earlier attempt produced already; they count towards max_new_tokens.
    stop_token_ids: generation ends after any of these.
    top_logprobs: None for no log-probabilities, else how many most likely tokens to report at each position.
    speculative: whether drafts may be made for it.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    generated: tuple[int, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    speculative: bool = True

    def check(self, vocab_size: int, context_length: int) -> None:
        """Raise InvalidRequest when a model of this vocabulary and context can never run it."""
        if not self.prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token")
        for token_id in (*self.prompt, *self.generated, *self.stop_token_ids, *self.sampling.logit_bias):
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"token id {token_id} is outside the vocabulary 0..{vocab_size - 1}")
        if len(self.prompt) + self.max_new_tokens > context_length:
            raise InvalidRequest(
                f"{len(self.prompt)} prompt tokens and {self.max_new_tokens} new tokens exceed the context of "
                f"{context_length} tokens"
            )
        if self.max_new_tokens == 0 and not self.prompt_logprobs:
            raise InvalidRequest("max_new_tokens is 0 and no prompt_logprobs are asked for: there is nothing to do")
        if len(self.generated) > self.max_new_tokens:
            raise InvalidRequest(f"{len(self.generated)} generated tokens exceed max_new_tokens {self.max_new_tokens}")
        if self.top_logprobs is not None and self.top_logprobs > vocab_size:
            raise InvalidRequest(f"top_logprobs is {self.top_logprobs}; the vocabulary has {vocab_size} tokens")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token and of the most likely ones, under the model's own distribution."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """What one engine step gave one sequence; the last has a finish reason."""

    token_ids: tuple[int, ...]
    llm_steps: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


SequenceEvent = StepOutput | Exception | None
"""What becomes of a sequence: it is queued (None), a step gives it tokens, or it fails."""

Sink = Callable[[StepOutput | Exception], None]
"""Called from the engine's thread with every output, then, if the sequence fails, with the error; must not block."""
