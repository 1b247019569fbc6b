"""What the gateway measures."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class GatewayMetrics:
    """The gateway's metrics in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "specserve_gateway_requests",
            "Completion requests by HTTP status; 499 when the client went away.",
            ["status"],
            registry=registry,
        )
        self.open_requests = Gauge(
            "specserve_gateway_open_requests", "Completion requests being served.", registry=registry
        )
        self.open_streams = Gauge(
            "specserve_gateway_open_streams", "Generations open at the verifiers.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "specserve_gateway_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "specserve_gateway_inter_token_seconds",
            "Between the steps of a choice, divided by the tokens of the later one.",
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("specserve_gateway_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter(
            "specserve_gateway_completion_tokens", "Tokens generated and used.", registry=registry
        )
        self.llm_steps = Counter(
            "specserve_gateway_llm_steps",
            "Steps of the LLM behind the completion tokens; tokens per step is the quotient.",
            registry=registry,
        )
        self.retries = Counter(
            "specserve_gateway_verifier_retries", "Attempts to resume a generation.", registry=registry
        )
        self.verifier_up = Gauge(
            "specserve_gateway_verifier_up",
            "Whether a verifier takes requests: reachable, not draining, of the right model.",
            ["verifier"],
            registry=registry,
        )
        self.verifier_streams = Gauge(
            "specserve_gateway_verifier_open_streams",
            "Generations of this gateway open at a verifier.",
            ["verifier"],
            registry=registry,
        )
        self.record_errors = Counter(
            "specserve_gateway_record_errors", "Writes to Redis that failed.", registry=registry
        )
