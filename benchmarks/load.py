"""Several streams at once: how much a server gives in all, and how long a reader waits."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.client import CompletionClient, Prompt, Stream

REQUESTS_PER_STREAM = 4


@dataclass(frozen=True)
class LoadSample:
    """What `streams` clients got that always had one request open each.

    tokens_per_s: while all of them had. first_token_ms: of each answer. gap_ms: between the events of an answer that
    brought text.
    """

    configuration: str
    streams: int
    round: int
    tokens_per_s: float
    first_token_ms: list[float]
    gap_ms: list[float]


def measure_load(
    client: CompletionClient, configuration: str, prompts: Sequence[Prompt], new_tokens: int, streams: int, turn: int
) -> LoadSample:
    """REQUESTS_PER_STREAM times `streams` requests, `streams` of them open, with the prompts in turn.

    Raises:
        RequestFailed: one request failed.
    """
    answers = stream_load(client, prompts, new_tokens, streams)
    return LoadSample(
        configuration,
        streams,
        turn,
        tokens_per_s=rate_of_all(answers),
        first_token_ms=[1000 * stream.times[0] for stream in answers],
        gap_ms=[1000 * gap for stream in answers for gap in _gaps(stream)],
    )


def stream_load(client: CompletionClient, prompts: Sequence[Prompt], new_tokens: int, streams: int) -> list[Stream]:
    """Answers to REQUESTS_PER_STREAM times `streams` requests, `streams` of them open, with the prompts in turn.

    Raises:
        RequestFailed: one request failed.
    """
    wanted = list(itertools.islice(itertools.cycle(prompts), REQUESTS_PER_STREAM * streams))
    return stream_all(client, wanted, new_tokens, streams)


def stream_all(client: CompletionClient, prompts: Sequence[Prompt], new_tokens: int, streams: int) -> list[Stream]:
    """An answer for each prompt, `streams` requests open at once.

    Raises:
        RequestFailed: one request failed.
    """
    with ThreadPoolExecutor(streams) as pool:
        return list(pool.map(lambda prompt: client.stream(prompt, new_tokens), prompts))


def rate_of_all(answers: Sequence[Stream]) -> float:
    """Tokens per second while every client had a request open: until the first that has nothing left to ask.

    How long the last answers go on beyond that says how even the answers are, not how fast they come. An answer's
    tokens are taken to be spread evenly over its events.
    """
    first, last = min(answer.started for answer in answers), max(answer.started for answer in answers)
    until = min(answer.ended for answer in answers if answer.ended > last)
    tokens = 0.0
    for answer in answers:
        times = answer.token_times
        tokens += answer.answer().tokens * bisect_right(times, until - answer.started) / max(1, len(times))
    return tokens / (until - first)


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
