"""What the verifier measures always, in the field's own counters."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from services.verifier.request import Sink, StepOutput
from speculation.acceptance import Accepted
from speculation.merge import MergedDraft

_ROUND_TRIPS = (0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0008, 0.001, 0.0015, 0.002, 0.004, 0.008, 0.016, 0.064, 0.256)
_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4)
_NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class StepReport:
    """What came of a step. drafts, accepted: by id of the sequences that decoded. outputs: what goes out to whom.

    rows: of all; chunk_rows: those of prompts.
    """

    rows: int
    chunk_rows: int
    drafts: Mapping[int, MergedDraft]
    accepted: Mapping[int, Accepted]
    draft_seconds: float
    step_seconds: float
    outputs: Sequence[tuple[Sink, StepOutput]]


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
        self.answer_seconds = Histogram(
            "specserve_verifier_answer_seconds",
            "Time from an order for drafts to its answer, by speculator.",
            ("speculator",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.round_trip_seconds = Histogram(
            "specserve_verifier_round_trip_seconds",
            "Part of it that the speculator, as it says, did not work: the way there and back.",
            ("speculator",),
            buckets=_ROUND_TRIPS,
            registry=registry,
        )
        self.settle_seconds = Summary(
            "specserve_verifier_settle_seconds",
            "Time to hand out a step's tokens, count it and learn from it, while the next step's drafts are made.",
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
            "speculator_failures",
            "Late, hung, invalid, unavailable or failed speculators, by reason.",
            "speculator",
            "reason",
        )

        # Looking a label up takes longer than counting, and every step does some ten times.
        self._step_of_rows = cache(self.step_seconds.labels)
        self._accepted_at = cache(self.accepted_at.labels)
        self._accepted_from = cache(self.accepted_from.labels)

    def count_step(self, report: StepReport) -> None:
        bucket = next((str(limit) for limit in _NODES if report.rows <= limit), f"over {_NODES[-1]}")
        self._step_of_rows(bucket).observe(report.step_seconds)
        self.draft_seconds.observe(report.draft_seconds)
        self.prompt_tokens.inc(report.chunk_rows)
        self.sequence_steps.inc(len(report.accepted))
        self.output_tokens.inc(sum(len(step.token_ids) for step in report.accepted.values()))
        drafted = [
            (draft, report.accepted[sequence_id]) for sequence_id, draft in report.drafts.items() if len(draft.tree) > 1
        ]
        if drafted:
            self._count_drafts(drafted)

    def _count_drafts(self, drafted: Sequence[tuple[MergedDraft, Accepted]]) -> None:
        self.drafts.inc(len(drafted))
        self.draft_tokens.inc(sum(len(draft.tree) - 1 for draft, _ in drafted))
        self.expected_tokens.inc(sum(math.exp(sure) for draft, _ in drafted for sure in draft.tree.confidences[1:]))
        self.accepted_tokens.inc(sum(len(step.nodes) for _, step in drafted))
        for depth, count in Tally(depth for _, step in drafted for depth, _ in enumerate(step.nodes, start=1)).items():
            self._accepted_at(depth).inc(count)
        sources: Tally[str] = Tally()
        for draft, step in drafted:
            for tree, nodes in zip(draft.components, draft.maps, strict=True):
                sources[tree.source] += len(set(nodes) & set(step.nodes))
        for source, count in sources.items():
            self._accepted_from(source).inc(count)
