"""What the speculator measures always."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class SpeculatorMetrics:
    """Prometheus metrics of one speculator process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.draft_tokens = Counter("specserve_speculator_draft_tokens", "Draft tokens sent.", registry=registry)
        self.streams = Gauge("specserve_speculator_streams", "Open Speculate streams.", registry=registry)
        self.suffix_index_tokens = Gauge(
            "specserve_speculator_suffix_index_tokens", "Tokens of earlier outputs in the index.", registry=registry
        )
        self.answer_seconds = Histogram(
            "specserve_speculator_answer_seconds",
            "Time from a message to its trees.",
            buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512),
            registry=registry,
        )
