"""OpenAI's SDK against a gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import openai
import pytest
from openai.types import Completion

from services.gateway.plan import choice_seed
from services.verifier.request import GenerationRequest
from tests.services.gateway.conftest import RunningGateway

TEXT = " count: 1, 2, 3 日本語 😀😀 and more"


def test_a_completion(gateway: RunningGateway) -> None:
    gateway.says(TEXT)
    completion = gateway.client.completions.create(model="scripted", prompt="Once upon", max_tokens=100)
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion.system_fingerprint is not None
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (TEXT, "stop", 0, None)
    expected = len(gateway.tokenizer.encode(TEXT).ids) + 1
    assert completion.usage is not None
    assert completion.usage.completion_tokens == expected
    assert completion.usage.prompt_tokens == len(gateway.tokenizer.encode("Once upon").ids)
    assert completion.usage.total_tokens == completion.usage.completion_tokens + completion.usage.prompt_tokens
    assert completion.usage.model_extra == {"llm_steps": expected}


def test_the_default_length_is_16_tokens(gateway: RunningGateway) -> None:
    gateway.says(TEXT)
    completion = gateway.client.completions.create(model="scripted", prompt="x")
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


@pytest.mark.parametrize("step_size", [1, 3, 100])
def test_a_stream_gives_the_same_text(gateway: RunningGateway, step_size: int) -> None:
    gateway.says(TEXT)
    gateway.script.step_size = step_size
    events = list(
        gateway.client.completions.create(
            model="scripted", prompt="x", max_tokens=100, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last, usage = events
    assert "".join(event.choices[0].text for event in [*pieces, last]) == TEXT
    assert not any("\ufffd" in event.choices[0].text for event in pieces)
    assert all(event.choices[0].finish_reason is None and event.usage is None for event in pieces)
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(gateway.tokenizer.encode(TEXT).ids) + 1
    assert len({event.id for event in events}) == 1


def test_a_stream_has_no_usage_unless_asked(gateway: RunningGateway) -> None:
    gateway.says("hello")
    events = list(gateway.client.completions.create(model="scripted", prompt="x", stream=True))
    assert all(event.usage is None and event.choices for event in events)


def test_the_async_sdk(gateway: RunningGateway) -> None:
    gateway.says(TEXT)

    async def stream() -> str:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            events = await client.completions.create(model="scripted", prompt="x", max_tokens=100, stream=True)
            return "".join([event.choices[0].text async for event in events])

    assert asyncio.run(stream()) == TEXT


def test_a_batch_with_several_choices(gateway: RunningGateway) -> None:
    def reply(request: GenerationRequest) -> list[int]:
        return [*request.prompt, 300 + request.sampling.seed % 7, 0]

    gateway.script.reply = reply
    prompts = ["one", "two"]
    completion = gateway.client.completions.create(model="scripted", prompt=prompts, n=3, seed=5)
    seeds = [choice_seed(5, choice) for choice in range(3)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    expected = [prompt + gateway.tokenizer.decode([300 + seed % 7]) for prompt in prompts for seed in seeds]
    assert [choice.text for choice in completion.choices] == expected
    assert [choice.index for choice in completion.choices] == list(range(6))
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == sum(len(gateway.tokenizer.encode(prompt).ids) for prompt in prompts)
    streamed = dict.fromkeys(range(6), "")
    for event in gateway.client.completions.create(model="scripted", prompt=prompts, n=3, seed=5, stream=True):
        [choice] = event.choices
        streamed[choice.index] += choice.text
    assert list(streamed.values()) == expected


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]], [[5, 6, 7], [8]]])
def test_prompts_of_token_ids(gateway: RunningGateway, prompt: list[int] | list[list[int]]) -> None:
    gateway.client.completions.create(model="scripted", prompt=prompt)
    sent = sorted(list(request.prompt) for request in gateway.script.requests)
    assert sent in ([[5, 6, 7]], [[5, 6, 7], [8]])
    assert len(sent) == (2 if prompt == [[5, 6, 7], [8]] else 1)


def test_parameters_reach_the_verifier(gateway: RunningGateway) -> None:
    gateway.client.completions.create(
        model="scripted",
        prompt="x",
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": -100, "9": 2},
        seed=-1,
        user="someone",
        best_of=1,
        extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5, "speculative": False},
    )
    [request] = gateway.script.requests
    sampling = request.sampling
    assert dict(sampling.logit_bias) == {7: -100, 9: 2}
    numbers = (sampling.temperature, sampling.top_p, sampling.presence_penalty, sampling.frequency_penalty)
    assert numbers == (0.5, 0.25, 1, -1)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.125, 1.5)
    assert not request.speculative
    assert sampling.seed == 2**64 - 1
    assert (request.max_new_tokens, list(request.stop_token_ids)) == (7, [0])


def test_requests_without_a_seed_differ(gateway: RunningGateway) -> None:
    gateway.client.completions.create(model="scripted", prompt=["x", "x"])
    assert len({request.sampling.seed for request in gateway.script.requests}) == 2


@pytest.mark.parametrize("step_size", [1, 4, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens(gateway: RunningGateway, step_size: int, stream: bool) -> None:
    gateway.says("one two three four five six seven")
    gateway.script.step_size = step_size
    gateway.script.delay_s = 0.01
    client = gateway.client.completions
    if stream:
        events = list(
            client.create(model="scripted", prompt="x", max_tokens=100, stop=["ee fo"], stream=True, logprobs=0)
        )
        text = "".join(event.choices[0].text for event in events)
        finish_reason = events[-1].choices[0].finish_reason
        tokens = [
            token for event in events if event.choices[0].logprobs for token in event.choices[0].logprobs.tokens or []
        ]
    else:
        completion = client.create(model="scripted", prompt="x", max_tokens=100, stop="ee fo", logprobs=0)
        assert completion.choices[0].logprobs is not None
        text, finish_reason = completion.choices[0].text, completion.choices[0].finish_reason
        tokens = completion.choices[0].logprobs.tokens or []
        up_to_the_stop = next(
            count
            for count in range(100)
            if "ee fo" in gateway.tokenizer.decode(gateway.tokenizer.encode("one two three four five").ids[:count])
        )
        assert completion.usage is not None
        assert completion.usage.completion_tokens == up_to_the_stop
    assert (text, finish_reason) == ("one two thr", "stop")
    assert "".join(tokens).startswith("one two thr")
    assert not "".join(tokens).endswith("four")


def test_a_stop_string_ends_the_generation(gateway: RunningGateway) -> None:
    gateway.says("a b STOP" + " more" * 30)
    gateway.script.delay_s = 0.02
    gateway.client.completions.create(model="scripted", prompt="x", max_tokens=200, stop="STOP")
    [request] = gateway.script.requests
    assert gateway.script.cancelled[request.request_id].wait(2)


def test_text_that_only_resembles_a_stop_string_is_kept(gateway: RunningGateway) -> None:
    gateway.says("an EN", end=False)
    completion = gateway.client.completions.create(model="scripted", prompt="x", stop="END", max_tokens=100)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("an EN", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_echo(gateway: RunningGateway, stream: bool) -> None:
    gateway.says(" 日本")
    result = gateway.client.completions.create(model="scripted", prompt="Grüße 😀", echo=True, stream=stream)
    events = [result] if isinstance(result, Completion) else list(result)
    assert "".join(event.choices[0].text for event in events) == "Grüße 😀 日本"


def test_echo_of_the_prompt_alone(gateway: RunningGateway) -> None:
    completion = gateway.client.completions.create(model="scripted", prompt="Grüße", echo=True, max_tokens=0)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("Grüße", "length")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 0
    assert gateway.script.requests == []


@pytest.mark.parametrize("max_tokens", [0, 50])
def test_echo_with_logprobs_reports_the_prompt(gateway: RunningGateway, max_tokens: int) -> None:
    gateway.says(" then 日本")
    prompt = "Once upon 日本"
    [choice] = gateway.client.completions.create(
        model="scripted", prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens
    ).choices
    expected = prompt + (" then 日本" if max_tokens else "")
    assert choice.text == expected
    report = choice.logprobs
    assert report is not None
    assert report.tokens is not None
    assert report.token_logprobs is not None
    assert report.top_logprobs is not None
    assert report.text_offset is not None
    assert report.token_logprobs[0] is None
    assert report.top_logprobs[0] is None
    assert report.token_logprobs[1:] == [-1.5] * (len(report.tokens) - 1)
    assert len(report.top_logprobs[1]) == 3
    for token, offset in zip(report.tokens, report.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:].startswith(token)


def test_logprobs_without_echo_count_offsets_from_the_prompt(gateway: RunningGateway) -> None:
    gateway.says("ab")
    [choice] = gateway.client.completions.create(model="scripted", prompt="12345", logprobs=5).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "<|endoftext|>"]
    assert choice.logprobs.text_offset == [5, 6, 7]
    assert choice.logprobs.top_logprobs is not None
    assert len(choice.logprobs.top_logprobs[0]) == 6
    assert choice.logprobs.top_logprobs[0]["a"] == -1.5


def test_first_piece_does_not_wait_for_the_rest(gateway: RunningGateway) -> None:
    gateway.script.reply = lambda request: [300] * 100
    gateway.script.delay_s = 0.1
    began = time.monotonic()
    stream = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100, stream=True)
    next(iter(stream))
    assert time.monotonic() - began < 5  # all of it takes 10 s
    stream.close()


def test_many_streams_at_once(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway()
    gateway.says(TEXT)
    gateway.script.delay_s = 0.005

    async def one(client: openai.AsyncOpenAI) -> str:
        events = await client.completions.create(model="scripted", prompt="x", max_tokens=100, stream=True)
        return "".join([event.choices[0].text async for event in events])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(100)))

    assert asyncio.run(all_of_them()) == [TEXT] * 100
