from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.logits import LogitsPipeline
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree
from tests.speculation.trees import token_path, token_trees

INF = float("inf")


def probabilities(params: SamplingParams, logits: list[float], output: tuple[int, ...] = ()) -> list[float]:
    pipeline = LogitsPipeline(params, [0], len(logits))
    pipeline.advance(output)
    return pipeline.process(torch.tensor(logits)).exp().tolist()


def logs(*values: float) -> list[float]:
    return [math.log(value) for value in values]


@pytest.mark.parametrize(
    ("params", "logits", "expected"),
    [
        pytest.param({}, logs(0.5, 0.3, 0.2), [0.5, 0.3, 0.2], id="plain"),
        pytest.param({"logit_bias": {2: math.log(4)}}, logs(0.5, 0.3, 0.2), [0.3125, 0.1875, 0.5], id="logit_bias"),
        pytest.param({"temperature": 0.5}, logs(0.6, 0.2, 0.2), [9 / 11, 1 / 11, 1 / 11], id="temperature"),
        pytest.param({"temperature": 1e-30}, [3.0, 2.0, 3.0], [0.5, 0.0, 0.5], id="tiny temperature"),
        pytest.param({"top_k": 2}, logs(0.5, 0.3, 0.2), [0.625, 0.375, 0.0], id="top_k"),
        pytest.param({"top_k": 9}, logs(0.5, 0.3, 0.2), [0.5, 0.3, 0.2], id="top_k beyond the vocabulary"),
        pytest.param({"top_k": 2}, logs(0.2, 0.4, 0.2, 0.2), [0.2, 0.4, 0.2, 0.2], id="top_k keeps ties"),
        pytest.param({"top_p": 0.6}, logs(0.5, 0.3, 0.2), [0.625, 0.375, 0.0], id="top_p"),
        pytest.param({"top_p": 1e-9}, logs(0.2, 0.5, 0.3), [0.0, 1.0, 0.0], id="top_p keeps one"),
        # After top-k the rest is 5/8 and 3/8: top-p = .6 is reached by the first alone.
        pytest.param({"top_k": 2, "top_p": 0.6}, logs(0.5, 0.3, 0.2), [1.0, 0.0, 0.0], id="top_k before top_p"),
        pytest.param({"min_p": 0.5}, logs(0.5, 0.3, 0.2), [0.625, 0.375, 0.0], id="min_p"),
        # At temperature 2 the ratios .6 and .4 become .77 and .63.
        pytest.param(
            {"min_p": 0.5, "temperature": 2.0},
            logs(0.5, 0.3, 0.2),
            [0.4154, 0.3218, 0.2627],
            id="temperature before min_p",
        ),
    ],
)
def test_by_hand(params: Mapping[str, Any], logits: list[float], expected: list[float]) -> None:
    assert probabilities(SamplingParams(**params), logits) == pytest.approx(expected, abs=1e-4)


# The prompt is [0]; the output is 1, 1, 2; token 3 is new.
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param({"repetition_penalty": 2.0}, [1.0, -2.0, 0.25, 2.0], id="repetition: prompt and output"),
        pytest.param({"frequency_penalty": 0.5}, [2.0, -2.0, 0.0, 2.0], id="frequency: output, by count"),
        pytest.param({"presence_penalty": 0.5}, [2.0, -1.5, 0.0, 2.0], id="presence: output, once"),
        pytest.param({"frequency_penalty": -1.0}, [2.0, 1.0, 1.5, 2.0], id="negative frequency"),
        pytest.param(
            {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 1.0, "logit_bias": {2: 1.5}},
            [1.0, -4.0, -0.5, 2.0],
            id="bias, repetition, frequency and presence in this order",
        ),
    ],
)
def test_penalties_by_hand(params: dict[str, Any], expected: list[float]) -> None:
    pipeline = LogitsPipeline(SamplingParams(temperature=0, **params), [0], 4)
    pipeline.advance([1])
    scores = pipeline.process(torch.tensor([2.0, -1.0, 0.5, 2.0]), (1, 2))
    assert scores.tolist() == pytest.approx(expected)


@given(st.integers(0, 2**32), st.floats(0.01, 1.0), st.floats(0.3, 3.0))
def test_top_p_is_the_smallest_set(seed: int, top_p: float, scale: float) -> None:
    logits = torch.randn(700, generator=torch.Generator().manual_seed(seed)) * scale
    p = logits.double().softmax(-1)
    kept = LogitsPipeline(SamplingParams(top_p=top_p), [], 700).process(logits) > -INF
    mass, smallest = p[kept].sum().item(), p[kept].min().item()
    assert mass >= top_p - 1e-5
    assert mass - smallest < top_p + 1e-5, "one token less would do"
    assert smallest >= p.masked_fill(kept, 0).max().item()


def test_plain_greedy_hands_the_logits_back() -> None:
    pipeline = LogitsPipeline(SamplingParams(temperature=0, top_k=3, seed=4), [1], 5)
    logits = torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0])
    assert pipeline.plain_argmax
    assert pipeline.process(logits).data_ptr() == logits.data_ptr()
    assert int(pipeline.process(logits).argmax()) == 1, "of equal logits the lowest id"
    for active in ({"logit_bias": {3: 0.1}}, {"repetition_penalty": 1.1}, {"temperature": 1.0}):
        params = SamplingParams(**({"temperature": 0.0} | active))
        assert not LogitsPipeline(params, [1], 5).plain_argmax


def test_inputs_stay_untouched() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    params = SamplingParams(
        {1: 2.0}, repetition_penalty=1.3, frequency_penalty=0.2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1
    )
    LogitsPipeline(params, [1, 2], 8).process_many(logits, [(), (3,), (3, 3)])
    assert torch.equal(logits, before)


def test_draft_log_probs_are_normalised() -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    greedy = LogitsPipeline(SamplingParams(temperature=0), [], 6).draft_log_probs(logits)
    assert torch.equal(greedy, logits.log_softmax(-1))
    sampled = LogitsPipeline(SamplingParams(temperature=0.5), [], 6)
    assert torch.equal(sampled.draft_log_probs(logits), sampled.process_many(logits))


def test_bfloat16_logits_become_float32() -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert LogitsPipeline(SamplingParams(), [], 6).process(logits).dtype == torch.float32


def test_bad_tokens_and_missing_paths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_bias has token 9; the vocabulary has tokens 0\.\.4"):
        LogitsPipeline(SamplingParams({9: 1.0}), [], 5)
    with pytest.raises(ValueError, match="the prompt has token -1"):
        LogitsPipeline(SamplingParams(), [-1], 5)
    pipeline = LogitsPipeline(SamplingParams(presence_penalty=1), [], 5)
    with pytest.raises(ValueError, match="no paths for 2 nodes"):
        pipeline.process_many(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="1 paths for 2 nodes"):
        pipeline.process_many(torch.zeros(2, 5), [()])


sampling_params = st.builds(
    SamplingParams,
    logit_bias=st.dictionaries(st.integers(0, 7), st.floats(-5, 5), max_size=2),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.2]),
)


@given(
    sampling_params,
    token_trees(vocab_size=8),
    st.lists(st.integers(0, 7), max_size=5),
    st.lists(st.integers(0, 7), max_size=4),
    st.integers(0, 2**32),
)
def test_exact_under_speculation(
    params: SamplingParams, tree: TokenTree, prompt: list[int], output: list[int], seed: int
) -> None:
    """Every node gets bit for bit what plain decoding gets after committing the node's path."""
    logits = torch.randn(len(tree), 8, generator=torch.Generator().manual_seed(seed)) * 3
    pipeline = LogitsPipeline(params, prompt, 8)
    pipeline.advance(output)
    paths = [token_path(tree, node) for node in range(len(tree))]
    together = pipeline.process_many(logits, paths)
    for node, path in enumerate(paths):
        plain = LogitsPipeline(params, prompt, 8)
        for token_id in (*output, *path):
            plain.advance([token_id])
        expected = plain.process(logits[node])
        assert torch.equal(pipeline.process(logits[node], path), expected)
        assert torch.equal(together[node], expected)
