"""All nodes at once, as on a GPU, against the nodes that acceptance visits one by one."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest
import torch

from services.verifier.request import GenerationRequest
from services.verifier.runner import StepLogits
from services.verifier.sequence import Sequence
from services.verifier.verification import Choosing, verify
from speculation.acceptance import AcceptanceRule
from speculation.logits import LogitsPipeline
from speculation.merge import MergedDraft
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree

VOCAB = 12
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(temperature=0, logit_bias={3: 2.0}),
    SamplingParams(seed=7),
    SamplingParams(seed=2**64 - 1, temperature=0.6),
    SamplingParams(seed=8, temperature=0.6, top_p=0.8, frequency_penalty=0.9),
    SamplingParams(seed=9, temperature=1.4, top_k=5, min_p=0.05),
]


def make_sequence(sequence_id: int, params: SamplingParams) -> Sequence:
    prompt = (1, 2, 3, sequence_id % VOCAB)
    request = GenerationRequest(str(sequence_id), prompt, params, max_new_tokens=50)
    return Sequence(sequence_id, request, lambda output: None, LogitsPipeline(params, prompt, VOCAB))


def make_step(sequences: Items[Sequence], seed: int) -> tuple[dict[int, MergedDraft], StepLogits]:
    """Trees that are often right: few tokens, peaked logits."""
    generator = torch.Generator().manual_seed(seed)
    drafts, starts, rows = {}, {}, 0
    for sequence in sequences:
        parents, tokens, edges = [-1], [sequence.tokens[-1]], set()
        for _ in range(30):
            parent, token = (int(torch.randint(0, high, (), generator=generator)) for high in (len(parents), VOCAB))
            if (parent, token) not in edges:
                edges.add((parent, token))
                parents.append(parent)
                tokens.append(token)
        drafts[sequence.id] = MergedDraft.single(TokenTree(tuple(tokens), tuple(parents)))
        starts[sequence.id] = rows
        rows += len(tokens)
    return drafts, StepLogits(rows, 0, 2 * torch.randn(rows, VOCAB, generator=generator), starts, {})


@pytest.mark.parametrize("choosing", [Choosing.AT_ONCE, Choosing.NATIVE])
@pytest.mark.parametrize("rule", [AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
def test_choosing_behind_all_nodes_changes_nothing(rule: AcceptanceRule, choosing: Choosing) -> None:
    depths = set()
    for seed in range(20):
        sequences = [make_sequence(index, params) for index, params in enumerate(PARAMS)]
        drafts, logits = make_step(sequences, seed)
        at_once = verify(sequences, drafts, logits, rule, choosing)
        assert at_once == verify(sequences, drafts, logits, rule, Choosing.VISITED)
        depths |= {len(step.nodes) for step in at_once.values()}
    assert {0, 1, 2} <= depths


def test_draws_stay_sequential() -> None:
    sequences = [make_sequence(index, params) for index, params in enumerate(PARAMS)]
    drafts, logits = make_step(sequences, 0)
    at_once = verify(sequences, drafts, logits, AcceptanceRule.MSS, Choosing.AT_ONCE)
    assert at_once == verify(sequences, drafts, logits, AcceptanceRule.MSS, Choosing.VISITED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_chooses_what_the_cpu_chooses() -> None:
    params = SamplingParams(seed=5, temperature=0.7, top_p=0.9)
    sequence = make_sequence(1, params)
    drafts, logits = make_step([sequence], 3)
    expected = verify([sequence], drafts, logits, AcceptanceRule.SHARED_NOISE, Choosing.VISITED)
    own = Sequence(1, sequence.request, lambda output: None, LogitsPipeline(params, (1, 2, 3, 1), VOCAB, "cuda"))
    moved = StepLogits(logits.rows, 0, logits.trees.cuda(), logits.tree_starts, {})
    assert verify([own], drafts, moved, AcceptanceRule.SHARED_NOISE, Choosing.AT_ONCE) == expected
