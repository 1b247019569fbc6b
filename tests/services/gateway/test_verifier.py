"""A verifier that goes away in the middle of a text."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer

from services.common.model_files import tokenizer_hash
from services.gateway.settings import GatewaySettings
from services.gateway.verifier import FIRST_BACKOFF_S, LONGEST_BACKOFF_S
from services.verifier.request import QueueFull
from tests.services.gateway.conftest import RunningGateway, counter, wait_until
from tests.services.gateway.scripted_verifier import Facts

TEXT = "one two three four five six seven 日本語 😀"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lost_after", [0, 7])
def test_the_text_goes_on_after_a_loss(gateway: RunningGateway, stream: bool, lost_after: int) -> None:
    gateway.says(TEXT)
    gateway.script.lost_after, gateway.script.losses = lost_after, 1
    result = gateway.client.completions.create(
        model="scripted",
        prompt="x",
        max_tokens=100,
        stream=stream,
        logprobs=1,
        echo=True,
        stream_options={"include_usage": True} if stream else openai.omit,
    )
    events = [result] if isinstance(result, openai.types.Completion) else list(result)
    assert "".join(event.choices[0].text for event in events if event.choices) == "x" + TEXT
    usage = events[-1].usage
    tokens = len(gateway.tokenizer.encode(TEXT).ids) + 1
    assert usage is not None
    assert (usage.completion_tokens, usage.model_extra) == (tokens, {"llm_steps": tokens})
    first, second = gateway.script.requests
    assert first.generated == ()
    assert len(second.generated) == lost_after
    assert second.sampling == first.sampling
    assert second.prompt_logprobs == (lost_after == 0)
    assert counter(gateway, "specserve_gateway_verifier_retries_total") == 1


def test_attempts_are_bounded(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway(resume_attempts=2)
    gateway.says(TEXT)
    gateway.script.lost_after, gateway.script.losses = 3, 100
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100)
    assert (caught.value.status_code, caught.value.code) == (503, "verifier_unavailable")
    # every attempt begins behind token 3, so none makes progress
    assert len(gateway.script.requests) == 3


def test_by_default_the_time_is_what_ends_an_outage() -> None:
    shortest = [min(FIRST_BACKOFF_S * 2**n, LONGEST_BACKOFF_S) / 2 for n in range(GatewaySettings.resume_attempts)]
    assert sum(shortest) > GatewaySettings.resume_timeout_s


def test_a_resumed_generation_waits_for_a_full_queue(gateway: RunningGateway) -> None:
    gateway.says(TEXT)
    gateway.script.lost_after, gateway.script.losses = 3, 1
    gateway.script.refuse = lambda request: QueueFull(8, retry_after_ms=300) if request == 1 else None
    began = time.monotonic()
    completion = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100)
    assert completion.choices[0].text == TEXT
    assert time.monotonic() - began >= 0.3
    assert len(gateway.script.requests) == 3


def test_progress_renews_the_attempts(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway(resume_attempts=1)
    gateway.says(TEXT)
    gateway.script.lost_after, gateway.script.losses, gateway.script.loss_distance = 3, 4, 2
    completion = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100)
    assert completion.choices[0].text == TEXT
    assert len(gateway.script.requests) == 5


@contextmanager
def verifier_process(port: int, facts: Facts, reply: list[int], delay_s: float) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [str(port), json.dumps(asdict(facts)), json.dumps(reply), str(delay_s)]
    process = subprocess.Popen([sys.executable, "-m", "tests.services.gateway.scripted_verifier", *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def test_a_killed_verifier_and_its_successor(
    start_gateway: Callable[..., RunningGateway], byte_level_folder: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    facts = Facts(tokenizer_hash(byte_level_folder))
    tokenizer = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    reply = [*tokenizer.encode(TEXT).ids, 0]
    gateway = start_gateway(verifier=f"127.0.0.1:{port}")
    client = gateway.client

    def served() -> bool:
        try:
            return bool(client.models.list().data)
        except openai.InternalServerError:
            return False

    text = ""
    with ExitStack() as processes:
        first = processes.enter_context(verifier_process(port, facts, reply, 0.05))
        wait_until(served, timeout_s=15)
        for event in client.completions.create(model="scripted", prompt="x", max_tokens=100, stream=True):
            if not text:
                first.kill()
                first.wait(10)
                processes.enter_context(verifier_process(port, facts, reply, 0))
            text += event.choices[0].text
    assert text == TEXT
    assert counter(gateway, "specserve_gateway_verifier_retries_total") >= 1


def test_all_sequences_share_a_stream_that_outlives_them(gateway: RunningGateway) -> None:
    gateway.says(TEXT)
    for choices in (6, 1):
        completion = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100, n=choices)
        assert [choice.text for choice in completion.choices] == [TEXT] * choices
    assert gateway.servicer.streams == 1


def test_a_successor_with_another_model_does_not_go_on(gateway: RunningGateway) -> None:
    gateway.says(TEXT)
    gateway.script.delay_s = 0.05
    gateway.script.lost_after, gateway.script.losses = 3, 1
    stream = gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100, stream=True)
    next(iter(stream))
    gateway.servicer.facts = replace(gateway.servicer.facts, model="another")
    with pytest.raises(openai.APIError, match="now serves another"):
        list(stream)


def test_a_verifier_that_does_not_come_back(start_gateway: Callable[..., RunningGateway]) -> None:
    gateway = start_gateway(resume_timeout_s=0.5)
    gateway.says(TEXT)
    gateway.script.lost_after, gateway.script.losses = 3, 100
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError, match="unavailable"):
        gateway.client.completions.create(model="scripted", prompt="x", max_tokens=100)
    assert time.monotonic() - began < 10


def test_another_tokenizer_is_refused_with_both_hashes(
    start_gateway: Callable[..., RunningGateway], byte_level_folder: Path
) -> None:
    gateway = start_gateway(facts={"tokenizer_hash": "f00d"})
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.client.completions.create(model="scripted", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "model_mismatch")
    assert "f00d" in caught.value.message
    assert tokenizer_hash(byte_level_folder) in caught.value.message
