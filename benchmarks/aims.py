"""What the table is to show of SpecServe on a small CPU machine, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.configurations import LOOKUP, Configuration
from benchmarks.load import LoadRow
from benchmarks.peers.home import LLAMA_CPP, VLLM
from benchmarks.samples import PeerSteps, StepTimes
from benchmarks.summary import Row

STEP_WITHIN = 1.15
NODES_WITHIN = {4: 1.1, 8: 1.6}
OVER_LLAMA, OVER_LLAMA_DRAFT, OVER_OTHERS = 2.0, 1.0, 3.0


@dataclass(frozen=True)
class Aim:
    """value: what was measured, to be at least `bound`, or at most."""

    title: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def missed_by(self) -> float:
        """Factor by which the value would have to change; 1 or less when the aim is met."""
        return self.bound / self.value if self.at_least else self.value / self.bound


def step_aims(ours: StepTimes, theirs: Sequence[PeerSteps]) -> Iterator[Aim]:
    """theirs: llama.cpp with weights as wide as ours."""
    for peer in theirs:
        yield Aim(f"time of a plain step, of {peer.title}'s", ours.median_ms[1] / peer.ms[1], STEP_WITHIN, False)
    for nodes, bound in NODES_WITHIN.items():
        ratio = ours.median_ms[nodes] / ours.median_ms[1]
        yield Aim(f"time of a step of {nodes} nodes, of one of 1", ratio, bound, False)


def stream_aims(rows: Sequence[Row]) -> Iterator[Aim]:
    """Our default against the fastest row of each kind of peer."""
    kinds: list[tuple[str, float, list[Row]]] = [
        ("llama.cpp, plain", OVER_LLAMA, _rows(rows, LLAMA_CPP, drafts=False)),
        ("llama.cpp with its draft model", OVER_LLAMA_DRAFT, _rows(rows, LLAMA_CPP, drafts=True)),
        ("vLLM CPU", OVER_OTHERS, [row for row in rows if row.configuration.engine == VLLM]),
        ("Hugging Face", OVER_OTHERS, [row for row in rows if row.configuration.engine == "transformers"]),
    ]
    for name, bound, found in kinds:
        if found:
            best = min(found, key=lambda row: row.ms_per_token.median)
            yield Aim(f"times as fast per token as {name}, one stream", best.behind_ours.median, bound)


def load_aims(rows: Sequence[LoadRow], configurations: Sequence[Configuration]) -> Iterator[Aim]:
    """Our default's throughput against the best peer's."""
    ours = {configuration.key for configuration in configurations if configuration.engine == "specserve"}
    for streams in dict.fromkeys(row.streams for row in rows):
        at_once = [row for row in rows if row.streams == streams]
        peers = [row.tokens_per_s for row in at_once if row.configuration not in ours]
        own = [row.tokens_per_s for row in at_once if row.configuration == LOOKUP.key]
        if peers and own:
            yield Aim(f"throughput, of the best peer's, {streams} streams", own[0] / max(peers), 1.0)


def _rows(rows: Sequence[Row], engine: str, drafts: bool) -> list[Row]:
    return [row for row in rows if row.configuration.engine == engine and row.configuration.drafts == drafts]
