"""From samples to the rows of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.configurations import HF, LOOKUP, PLAIN, Configuration
from benchmarks.samples import LatencyPair, Sample


@dataclass(frozen=True)
class Quartiles:
    """low and high: the first and the third quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        low, median, high = np.percentile(list(values), [25, 50, 75])
        return cls(float(low), float(median), float(high))


@dataclass(frozen=True)
class Row:
    """One configuration.

    tokens_per_step: all tokens over all LLM steps. ms_per_token: over prompts, each the median of its rounds.
    over_plain, over_hf: speed-ups, ratios of the same prompt in the same round; behind_ours: our default's speed-up
    over this row. first_token_ms: median.
    same_as_hf, same_as_plain: prompts whose text and token count were the same in every round, of `prompts`.
    What compares with Hugging Face is None where it took no part.
    """

    configuration: Configuration
    prompts: int
    tokens_per_step: float
    ms_per_token: Quartiles
    over_plain: Quartiles
    over_hf: Quartiles | None
    behind_ours: Quartiles
    first_token_ms: float
    same_as_hf: int | None
    same_as_plain: int


@dataclass(frozen=True)
class LatencyRow:
    """What the gateway adds, in milliseconds: to each event that carries tokens, and to the first."""

    configuration: Configuration
    per_event: Quartiles
    to_first: Quartiles
    requests: int


def summarize(configurations: Sequence[Configuration], samples: Sequence[Sample]) -> list[Row]:
    """A row for each configuration; the speed-up over Hugging Face is that over the fastest plain `generate`.

    PLAIN and LOOKUP, our default, are among the configurations.
    """
    by_key = {c.key: [s for s in samples if s.configuration == c.key] for c in configurations}
    plain_hf = [c.key for c in configurations if c.engine == "transformers" and not c.drafts]
    fastest_hf = min(plain_hf, key=lambda key: _ms_per_token(by_key[key]).median, default=None)
    return [
        Row(
            configuration=configuration,
            prompts=len({s.prompt for s in own}),
            tokens_per_step=sum(s.answer.tokens for s in own) / sum(s.answer.llm_steps for s in own),
            ms_per_token=_ms_per_token(own),
            over_plain=_speed_up(own, by_key[PLAIN.key]),
            over_hf=None if fastest_hf is None else _speed_up(own, by_key[fastest_hf]),
            behind_ours=_speed_up(by_key[LOOKUP.key], own),
            first_token_ms=float(np.median([1000 * s.answer.first_token_s for s in own])),
            same_as_hf=_same(own, by_key[HF.key]) if HF.key in by_key else None,
            same_as_plain=_same(own, by_key[PLAIN.key]),
        )
        for configuration in configurations
        for own in [by_key[configuration.key]]
    ]


def summarize_latency(configurations: Sequence[Configuration], pairs: Sequence[LatencyPair]) -> list[LatencyRow]:
    """A row for each configuration that was measured both ways."""
    return [
        LatencyRow(
            configuration,
            Quartiles.of(pair.added_ms_per_event for pair in own),
            Quartiles.of(pair.added_ms_to_first for pair in own),
            len(own),
        )
        for configuration in configurations
        if (own := [pair for pair in pairs if pair.configuration == configuration.key])
    ]


def _ms_per_token(samples: Sequence[Sample]) -> Quartiles:
    by_prompt: dict[int, list[float]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample.answer.ms_per_token)
    return Quartiles.of(float(np.median(rounds)) for rounds in by_prompt.values())


def _speed_up(samples: Sequence[Sample], baseline: Sequence[Sample]) -> Quartiles:
    base: Mapping[tuple[int, int], Sample] = {(s.prompt, s.round): s for s in baseline}
    return Quartiles.of(base[s.prompt, s.round].answer.ms_per_token / s.answer.ms_per_token for s in samples)


def _same(samples: Sequence[Sample], reference: Sequence[Sample]) -> int:
    def outputs(of: Sequence[Sample], prompt: int) -> set[tuple[str, int]]:
        return {(s.answer.text, s.answer.tokens) for s in of if s.prompt == prompt}

    prompts = {s.prompt for s in samples}
    return sum(len(outputs(samples, prompt) | outputs(reference, prompt)) == 1 for prompt in prompts)
