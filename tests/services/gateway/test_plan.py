from __future__ import annotations

import asyncio
import hashlib
import struct
from typing import Any

import pytest

from services.gateway.errors import ApiError
from services.gateway.generation import ModelFacts
from services.gateway.plan import INLINE_CHARACTERS, CompletionPlan, Limits, choice_seed, plan_completion
from services.gateway.schemas import CompletionRequest
from services.gateway.tokenizer import GatewayTokenizer
from tests.services.gateway.tokenizers_for_tests import byte_fallback

LIBRARY = byte_fallback()
FACTS = ModelFacts("m", LIBRARY.get_vocab_size(), 64, "hash", (2,), "cpu", "float32", "torch")


def plan(**fields: Any) -> CompletionPlan:
    request = CompletionRequest.parse({"model": "m", "prompt": "the a"} | fields)
    return asyncio.run(plan_completion(request, FACTS, GatewayTokenizer(LIBRARY), Limits(16, 100)))


def test_seeds_of_choices() -> None:
    assert choice_seed(7, 0) == 7
    assert choice_seed(-1, 0) == 2**64 - 1
    digest = hashlib.sha256(struct.pack("<QQ", 7, 3)).digest()
    assert choice_seed(7, 3) == struct.unpack("<Q", digest[:8])[0]
    assert len({choice_seed(7, choice) for choice in range(100)}) == 100


def test_a_batch_gets_what_its_prompts_get_alone() -> None:
    batch = plan(prompt=["the a", "on the"], n=2, seed=7).sequences
    alone = [*plan(n=2, seed=7).sequences, *plan(prompt="on the", n=2, seed=7).sequences]
    assert [(s.prompt_token_ids, s.sampling) for s in batch] == [(s.prompt_token_ids, s.sampling) for s in alone]


def test_the_prompt_gets_the_special_tokens_of_its_tokenizer() -> None:
    assert plan().prompts == (tuple(LIBRARY.encode("the a").ids),)
    assert plan().prompts[0][0] == 1
    assert plan().sequences[0].stop_token_ids == (2,)


def test_the_longest_prompt_that_fits() -> None:
    assert plan(prompt=[5] * 60, max_tokens=4).prompt_tokens == 60
    with pytest.raises(ApiError, match="60 tokens and max_tokens is 5, 65 in all; the context of m is 64"):
        plan(prompt=[5] * 60, max_tokens=5)


def test_a_text_far_beyond_the_context() -> None:
    with pytest.raises(ApiError, match="shorten the prompt") as caught:
        plan(prompt="the " * INLINE_CHARACTERS)
    assert caught.value.code == "context_length_exceeded"


def test_prompt_logprobs_are_asked_for_with_echo_only() -> None:
    assert [s.prompt_logprobs for s in plan(logprobs=1).sequences] == [False]
    assert [s.prompt_logprobs for s in plan(logprobs=1, echo=True).sequences] == [True]
    assert [s.prompt_logprobs for s in plan(echo=True).sequences] == [False]
