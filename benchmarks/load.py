"""Several streams at once: how much a server gives in all, and how long a reader waits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.client import CompletionClient, Prompt, Stream

REQUESTS_PER_STREAM = 2


@dataclass(frozen=True)
class LoadSample:
    """What `streams` clients got that always had one request open each.

    tokens: of all answers. total_s: from the first request to the last answer. first_token_ms: of each answer.
    gap_ms: between the events of an answer that brought text.
    """

    configuration: str
    streams: int
    round: int
    tokens: int
    total_s: float
    first_token_ms: list[float]
    gap_ms: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total_s


def measure_load(
    client: CompletionClient, configuration: str, prompts: Sequence[Prompt], new_tokens: int, streams: int, turn: int
) -> LoadSample:
    """REQUESTS_PER_STREAM times `streams` requests, `streams` of them open, with the prompts in turn.

    Raises:
        RequestFailed: one request failed.
    """
    wanted = list(itertools.islice(itertools.cycle(prompts), REQUESTS_PER_STREAM * streams))
    answers, total_s = stream_all(client, wanted, new_tokens, streams)
    return LoadSample(
        configuration,
        streams,
        turn,
        tokens=sum(stream.answer().tokens for stream in answers),
        total_s=total_s,
        first_token_ms=[1000 * stream.times[0] for stream in answers],
        gap_ms=[1000 * gap for stream in answers for gap in _gaps(stream)],
    )


def stream_all(
    client: CompletionClient, prompts: Sequence[Prompt], new_tokens: int, streams: int
) -> tuple[list[Stream], float]:
    """A request for each prompt, `streams` of them open; and the seconds until the last answer has ended.

    Raises:
        RequestFailed: one request failed.
    """
    with ThreadPoolExecutor(streams) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda prompt: client.stream(prompt, new_tokens), prompts))
        return answers, time.perf_counter() - started


def _gaps(stream: Stream) -> Iterator[float]:
    return (later - earlier for earlier, later in itertools.pairwise(stream.token_times))


@dataclass(frozen=True)
class LoadRow:
    """All rounds of a configuration at a number of streams. tokens_per_s: median of the rounds; the rest in ms."""

    configuration: str
    streams: int
    tokens_per_s: float
    first_token_p50: float
    first_token_p99: float
    gap_p50: float
    gap_p99: float


def summarize_load(samples: Sequence[LoadSample]) -> list[LoadRow]:
    """A row for each configuration and number of streams, in the order of the samples."""
    keys = list(dict.fromkeys((sample.streams, sample.configuration) for sample in samples))
    rows = []
    for streams, configuration in sorted(keys, key=lambda key: key[0]):
        own = [s for s in samples if (s.streams, s.configuration) == (streams, configuration)]
        first = np.percentile([ms for s in own for ms in s.first_token_ms], [50, 99])
        gaps = np.percentile([ms for s in own for ms in s.gap_ms] or [0.0], [50, 99])
        rate = float(np.median([s.tokens_per_s for s in own]))
        rows.append(LoadRow(configuration, streams, rate, *map(float, first), *map(float, gaps)))
    return rows
