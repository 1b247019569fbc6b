"""What is measured: one request, answered once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One greedy completion of one prompt.

    tokens: generated, an end-of-text token included. events: messages that brought them.
    llm_steps: forward passes of the LLM, the one that gave the first token included.
    first_token_s, total_s: from the request to the first token, and to the end of the answer.
    """

    text: str
    tokens: int
    events: int
    llm_steps: int
    first_token_s: float
    total_s: float

    @property
    def ms_per_token(self) -> float:
        return 1000 * self.total_s / self.tokens


@dataclass(frozen=True)
class Sample:
    """The answer of a configuration to prompt number `prompt` in round number `round`."""

    configuration: str
    prompt: int
    round: int
    answer: Answer


@dataclass(frozen=True)
class LatencyPair:
    """The same request answered twice by one running stack: through the gateway, and by the verifier directly."""

    configuration: str
    prompt: int
    round: int
    gateway: Answer
    direct: Answer

    @property
    def added_ms_per_event(self) -> float:
        """(T_gateway - T_direct) / events."""
        return 1000 * (self.gateway.total_s - self.direct.total_s) / self.direct.events

    @property
    def added_ms_to_first(self) -> float:
        return 1000 * (self.gateway.first_token_s - self.direct.first_token_s)


@dataclass(frozen=True)
class StepTimes:
    """Median milliseconds of one step of a model by its number of tree nodes.

    device: "cpu", or the name of the GPU.
    """

    model: str
    device: str
    parameters: int
    dtype: str
    kernels: str
    context: int
    median_ms: dict[int, float]


@dataclass(frozen=True)
class PeerSteps:
    """Milliseconds of one step of a peer by its number of rows."""

    title: str
    ms: dict[int, float]


@dataclass(frozen=True)
class Trial:
    """One setting of a row as a few answers found it: median milliseconds per token."""

    title: str
    ms_per_token: float
