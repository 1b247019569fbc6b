"""What the verifier measures always, in the field's own counters."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4)
_NODES = (1, 2, 4, 8, 16, 32, 64)


class VerifierMetrics:
    """Prometheus metrics of one verifier process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"specserve_verifier_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"specserve_verifier_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests by how they ended.", "outcome")
        self.drafts = counter("drafts", "Trees verified that had at least one draft token.")
        self.draft_tokens = counter("draft_tokens", "Draft tokens verified, after merging.")
        self.expected_tokens = counter("expected_tokens", "Draft tokens expected to be accepted, of those verified.")
        self.accepted_tokens = counter("accepted_tokens", "Draft tokens accepted.")
        self.accepted_at = counter("accepted_at", "Draft tokens accepted, by their depth in the tree.", "depth")
        self.accepted_from = counter("accepted_from", "Draft tokens accepted, by draft source.", "source")
        self.output_tokens = counter("output_tokens", "Tokens produced, with the one that every step adds.")
        self.sequence_steps = counter("sequence_steps", "Verified trees, those of one node too.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed, again after a preemption.")
        self.step_seconds = Histogram(
            "specserve_verifier_step_seconds",
            "Time of one engine step by its rows, rounded up.",
            ("rows",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.draft_seconds = Histogram(
            "specserve_verifier_draft_seconds",
            "Time that a step waited for its drafts.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.step_curve = gauge(
            "step_curve_seconds", "Time of a step by its rows, as drafts are reckoned with.", "rows"
        )
        self.waiting = gauge("waiting_sequences", "Sequences in the queue.")
        self.running = gauge("running_sequences", "Sequences that take part in steps.")
        self.kv_free_blocks = gauge("kv_free_blocks", "Free blocks of the KV cache.")
        self.preemptions = counter("preemptions", "Sequences that gave their KV back and were computed again.")
        self.speculator_up = gauge("speculator_up", "1 while the stream to a speculator is open.", "speculator")
        self.speculator_failures = counter(
            "speculator_failures", "Late, hung, invalid or unavailable speculators, by reason.", "speculator", "reason"
        )

    def observe_step(self, rows: int, seconds: float) -> None:
        bucket = next((str(limit) for limit in _NODES if rows <= limit), f"over {_NODES[-1]}")
        self.step_seconds.labels(bucket).observe(seconds)
