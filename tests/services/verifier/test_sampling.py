"""Sampled requests through the services: a seed fixes the text, and the text has the LLM's distribution."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats

from speculation.acceptance import AcceptanceRule
from tests.services.harness import Services, Verifier
from tests.tiny_models import VOCAB

PROMPT = [5, 17, 60, 3]
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 0.8, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": {7: 5.0, 9: -100.0}},
    {"temperature": 0.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
]


def texts(verifier: Verifier, seeds: range) -> list[list[int]]:
    return [
        verifier.generate(PROMPT, 30, sampling={**parameters, "seed": seed}).token_ids
        for parameters in PARAMETERS
        for seed in seeds
    ]


@pytest.mark.parametrize("rule", [AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
def test_a_seed_gives_the_same_text_with_any_draft_or_none(
    rule: AcceptanceRule, llm: Path, ssms: list[Path], calibrated_ssms: list[Path], running: Services
) -> None:
    plain = texts(running.verifier(llm), range(3))
    drafted = running.verifier(llm, running.speculator(ssms[0]), acceptance=rule)
    assert texts(drafted, range(3)) == plain
    assert drafted.metric("accepted_tokens_total") > 0
    cut = running.verifier(llm, running.speculator(*calibrated_ssms), acceptance=rule, draft_nodes=5)
    assert texts(cut, range(3)) == plain
    assert all(cut.metric("accepted_from_total", source=ssm.name) > 0 for ssm in calibrated_ssms)
    merged = running.verifier(llm, running.speculator(*ssms), acceptance=rule, draft_width=(3, 2, 1), draft_nodes=16)
    with ThreadPoolExecutor(4) as pool:  # other sequences in the batch
        others = [pool.submit(merged.generate, [seed], 60, sampling={"temperature": 1.0}) for seed in range(1, 4)]
        assert texts(merged, range(3)) == plain
        assert all(len(other.result(60).token_ids) == 60 for other in others)
    assert len({tuple(text) for text in plain}) > len(PARAMETERS), "different seeds give different texts"


@pytest.mark.parametrize("rule", [AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
def test_a_request_without_speculation_gets_the_same_text_and_no_draft(
    rule: AcceptanceRule, llm: Path, ssms: list[Path], running: Services
) -> None:
    verifier = running.verifier(llm, running.speculator(ssms[0]), acceptance=rule)
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.7, "seed": 5}):
        drafted = verifier.generate(PROMPT, 30, sampling=sampling)
        drafts = verifier.metric("drafts_total")
        with ThreadPoolExecutor(2) as pool:  # beside a sequence that drafts
            beside = pool.submit(verifier.generate, PROMPT, 60)
            plain = verifier.generate(PROMPT, 30, sampling=sampling, speculative=False)
            assert len(beside.result(60).token_ids) == 60
        assert plain.token_ids == drafted.token_ids
        assert plain.llm_steps == 30 > drafted.llm_steps
        assert verifier.metric("drafts_total") > drafts, "the other one drafted"


def test_shared_noise_drafts_hit_more_often_than_naive_ones(llm: Path, ssms: list[Path], running: Services) -> None:
    hits = {}
    for rule in (AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE):
        verifier = running.verifier(llm, running.speculator(ssms[0]), acceptance=rule)
        for seed in range(10):
            verifier.generate(PROMPT, 30, sampling={"temperature": 1.0, "seed": seed})
        hits[rule] = verifier.metric("accepted_tokens_total") / verifier.metric("sequence_steps_total")
    assert hits[AcceptanceRule.SHARED_NOISE] > hits[AcceptanceRule.NAIVE]


# Three tokens of the vocabulary are left, so that two steps have nine outcomes whose exact probabilities are known.
ALLOWED = [11, 12, 13]
BIAS = dict.fromkeys(ALLOWED, 60.0)
SAMPLES = 1500
ERROR_RATE = 1e-4  # of a correct rule failing; the seeds are fixed, so that a pass stays a pass


def exact_pairs(llm: Path) -> dict[tuple[int, int], float]:
    """Probability of each pair of first two tokens under the LLM with BIAS."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    bias = torch.zeros(VOCAB)
    for token, value in BIAS.items():
        bias[token] = value

    def after(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.softmax((model(input_ids=torch.tensor([tokens])).logits[0, -1] + bias).double(), -1)

    first = after(PROMPT)
    return {(a, b): float(first[a] * after([*PROMPT, a])[b]) for a, b in itertools.product(ALLOWED, repeat=2)}


@pytest.mark.parametrize("rule", [AcceptanceRule.MSS, AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
def test_two_tokens_have_the_exact_joint_distribution(
    rule: AcceptanceRule, llm: Path, ssms: list[Path], running: Services
) -> None:
    verifier = running.verifier(llm, running.speculator(*ssms[:2]), acceptance=rule, draft_width=(2, 2), draft_nodes=8)
    sampling = {"temperature": 1.0, "logit_bias": BIAS}
    with ThreadPoolExecutor(8) as pool:
        samples = list(
            pool.map(lambda seed: verifier.generate(PROMPT, 3, sampling={**sampling, "seed": seed}), range(SAMPLES))
        )
    expected = exact_pairs(llm)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    pairs = [(sample.token_ids[0], sample.token_ids[1]) for sample in samples]
    counts = [pairs.count(pair) for pair in expected]
    assert sum(counts) == SAMPLES
    assert (
        stats.chisquare(counts, [SAMPLES * p / sum(expected.values()) for p in expected.values()]).pvalue > ERROR_RATE
    )
    assert verifier.metric("accepted_tokens_total") > SAMPLES / 4, "the drafts took part"
