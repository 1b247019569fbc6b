"""Rows of the tables from samples whose numbers can be checked by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.configurations import BEST_FIRST, HF, HF_BF16, LOOKUP, PLAIN, Configuration
from benchmarks.samples import Answer, LatencyPair, Sample
from benchmarks.summary import Quartiles, Row, summarize, summarize_latency


def sample(
    configuration: Configuration, prompt: int, turn: int, ms: float, steps: int = 10, text: str = "same"
) -> Sample:
    answer = Answer(text, tokens=10, events=steps, llm_steps=steps, first_token_s=0.002, total_s=10 * ms / 1000)
    return Sample(configuration.key, prompt, turn, answer)


def rows_of(samples: list[Sample], *configurations: Configuration) -> dict[str, Row]:
    """The rows, beside a default of ours that is as fast as plain decoding."""
    default = [dataclasses.replace(s, configuration=LOOKUP.key) for s in samples if s.configuration == PLAIN.key]
    return {row.configuration.key: row for row in summarize([*configurations, LOOKUP], samples + default)}


def test_speed_ups_pair_the_same_prompt_in_the_same_round() -> None:
    # Round 1 of the machine is ten times slower for everybody; the ratios do not see it.
    samples = [
        sample(configuration, prompt, turn, ms * (10 if turn else 1) * (1 + prompt))
        for configuration, ms in ((PLAIN, 6.0), (BEST_FIRST, 2.0), (HF, 8.0))
        for prompt in range(3)
        for turn in range(2)
    ]
    row = rows_of(samples, PLAIN, BEST_FIRST, HF)["tree"]
    assert [row.over_plain.low, row.over_plain.high] == pytest.approx([3, 3])
    assert row.over_hf is not None
    assert [row.over_hf.low, row.over_hf.high] == pytest.approx([4, 4])
    # Per prompt the median of 2 and 20 times its factor, then quartiles over factors 1, 2, 3.
    assert row.behind_ours.median == pytest.approx(1 / 3)
    assert row.ms_per_token.median == pytest.approx(22)
    assert row.ms_per_token.low == pytest.approx(16.5)


def test_the_base_is_the_fastest_plain_generate() -> None:
    samples = [sample(c, 0, 0, ms) for c, ms in ((PLAIN, 5.0), (HF, 8.0), (HF_BF16, 4.0))]
    rows = rows_of(samples, PLAIN, HF, HF_BF16)
    bases = [rows[key].over_hf for key in ("hf", "hf-bf16")]
    assert [base.median for base in bases if base is not None] == pytest.approx([0.5, 1])


def test_without_hugging_face_nothing_is_compared_with_it() -> None:
    row = rows_of([sample(PLAIN, 0, 0, 5.0)], PLAIN)["plain"]
    assert row.over_hf is None
    assert row.same_as_hf is None
    assert row.same_as_plain == 1


def test_tokens_per_step_weighs_prompts_by_their_steps() -> None:
    samples = [sample(c, prompt, 0, 1.0, steps) for c in (PLAIN, HF) for prompt, steps in ((0, 10), (1, 2))]
    assert rows_of(samples, PLAIN, HF)["plain"].tokens_per_step == pytest.approx(20 / 12)


def test_an_output_that_differs_in_one_round_is_not_the_same() -> None:
    samples = [sample(c, prompt, turn, 1.0) for c in (PLAIN, HF) for prompt in range(3) for turn in range(2)]
    samples += [sample(BEST_FIRST, prompt, 0, 1.0) for prompt in range(3)]
    samples += [sample(BEST_FIRST, prompt, 1, 1.0, text="other" if prompt == 1 else "same") for prompt in range(3)]
    rows = rows_of(samples, PLAIN, BEST_FIRST, HF)
    assert (rows["tree"].same_as_hf, rows["tree"].same_as_plain, rows["tree"].prompts) == (2, 2, 3)
    assert rows["plain"].same_as_hf == 3


def test_quartiles_lie_between_the_values() -> None:
    assert Quartiles.of([1, 2, 3, 4, 100]) == Quartiles(2, 3, 4)


def test_added_latency_is_spread_over_the_events_of_the_direct_answer() -> None:
    gateway = Answer("", tokens=20, events=12, llm_steps=10, first_token_s=0.005, total_s=0.120)
    direct = Answer("", tokens=20, events=10, llm_steps=10, first_token_s=0.003, total_s=0.100)
    (row,) = summarize_latency([PLAIN, BEST_FIRST], [LatencyPair(PLAIN.key, 0, 0, gateway, direct)])
    assert row.configuration is PLAIN
    assert row.per_event.median == pytest.approx(2)
    assert row.to_first.median == pytest.approx(2)
