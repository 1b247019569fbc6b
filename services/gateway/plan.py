"""From a valid request body to the sequences to generate: the checks that need the model, token ids, seeds."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.errors import ApiError, invalid
from services.gateway.generation import GenerationRequest, ModelFacts, Sampling
from services.gateway.schemas import CompletionRequest, Prompt
from services.gateway.tokenizer import GatewayTokenizer

# float32 on the wire cannot tell smaller values from 0; at this one only the most likely token is kept.
SMALLEST_TOP_P = 1e-6
# Longer texts together are tokenized in a thread of their own; shorter ones take less than the hand-over.
INLINE_CHARACTERS = 4096


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    max_choices: int
    max_stop_length: int


@dataclass(frozen=True)
class CompletionPlan:
    """One request, ready to run.

    sequences: one for each choice: choice j of prompt i at i * n + j, which is its index in the response.
    """

    request_id: str
    request: CompletionRequest
    facts: ModelFacts
    prompts: tuple[tuple[int, ...], ...]
    sequences: tuple[GenerationRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; the choices of a prompt share it."""
        return sum(map(len, self.prompts))


def choice_seed(seed: int, choice: int) -> int:
    """Seed of a prompt's choice, in 0..2^64-1: the request's own for choice 0, so that n changes nothing about it.

    seed_0 = seed mod 2^64; seed_j = first 8 bytes, little-endian, of SHA-256(seed_0 as 8 bytes || j as 8 bytes).
    """
    seed %= 1 << 64
    if choice == 0:
        return seed
    digest = hashlib.sha256(seed.to_bytes(8, "little") + choice.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little")


async def plan_completion(
    request: CompletionRequest, facts: ModelFacts, tokenizer: GatewayTokenizer, limits: Limits
) -> CompletionPlan:
    """Check the request against the model and the limits; ApiError when it cannot be served.

    Every prompt of a batch gets what it would get alone: the same seeds, too, when the request has one. Without one
    each prompt has a random seed of 63 bits.
    """
    _check(request, facts, limits)
    if sum([len(prompt) for prompt in request.prompt if isinstance(prompt, str)]) <= INLINE_CHARACTERS:
        prompts = _token_ids(request.prompt, tokenizer)
    else:
        prompts = await asyncio.to_thread(_token_ids, request.prompt, tokenizer)
    for index, prompt in enumerate(prompts):
        _check_prompt(prompt, index, request.max_tokens, facts)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    sequences: list[GenerationRequest] = []
    for prompt in prompts:
        seed = secrets.randbits(63) if request.seed is None else request.seed
        for choice in range(request.n):
            sequences.append(
                GenerationRequest(
                    request_id=f"{request_id}-{len(sequences)}",
                    model=facts.model,
                    prompt_token_ids=prompt,
                    sampling=_sampling(request, choice_seed(seed, choice)),
                    max_new_tokens=request.max_tokens,
                    stop_token_ids=facts.eos_token_ids,
                    top_logprobs=request.logprobs,
                    prompt_logprobs=request.echo and request.logprobs is not None,
                    speculative=request.speculative,
                )
            )
    return CompletionPlan(request_id, request, facts, prompts, tuple(sequences))


def check_model(name: str, facts: ModelFacts) -> None:
    """ApiError 404 unless the name is the served model's."""
    if name != facts.model:
        raise ApiError(
            404, f"model {name!r} is not served here; served: {facts.model!r}", param="model", code="model_not_found"
        )


def _check(request: CompletionRequest, facts: ModelFacts, limits: Limits) -> None:
    check_model(request.model, facts)
    choices = len(request.prompt) * request.n
    if choices > limits.max_choices:
        raise invalid(
            f"n is {request.n} with {len(request.prompt)} prompts, {choices} choices; allowed: {limits.max_choices} "
            "choices a request",
            "n",
        )
    if (longest := max(map(len, request.stop), default=0)) > limits.max_stop_length:
        raise invalid(
            f"stop has a string of {longest} characters; allowed: {limits.max_stop_length} characters", "stop"
        )
    for token_id in request.logit_bias:
        if token_id >= facts.vocab_size:
            raise invalid(f"logit_bias has token id {token_id}; allowed: 0..{facts.vocab_size - 1}", "logit_bias")


def _token_ids(prompts: Sequence[Prompt], tokenizer: GatewayTokenizer) -> tuple[tuple[int, ...], ...]:
    return tuple([prompt if isinstance(prompt, tuple) else tuple(tokenizer.encode(prompt)) for prompt in prompts])


def _check_prompt(prompt: tuple[int, ...], index: int, max_tokens: int, facts: ModelFacts) -> None:
    if not prompt:
        raise invalid(f"prompt {index} has no tokens; give a text that has some", "prompt")
    if len(prompt) + max_tokens > facts.context_length:
        raise invalid(
            f"prompt {index} has {len(prompt)} tokens and max_tokens is {max_tokens}, {len(prompt) + max_tokens} in "
            f"all; the context of {facts.model} is {facts.context_length}: shorten the prompt or lower max_tokens",
            "max_tokens" if len(prompt) < facts.context_length else "prompt",
            "context_length_exceeded",
        )
    for token_id in prompt:
        if not 0 <= token_id < facts.vocab_size:
            raise invalid(f"prompt {index} has token id {token_id}; allowed: 0..{facts.vocab_size - 1}", "prompt")


def _sampling(request: CompletionRequest, seed: int) -> Sampling:
    return Sampling(
        logit_bias=request.logit_bias,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=max(request.top_p, SMALLEST_TOP_P),
        min_p=request.min_p,
        seed=seed,
    )
