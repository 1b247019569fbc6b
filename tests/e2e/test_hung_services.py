"""`specserve up` when a service stops answering while its process lives: it is restarted, and no text changes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.test_whole_stack import PROMPT, Stack, children_of
from tests.services.launcher.conftest import alive


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The verifier is a group of two ranks."""
    flags = ("--threads", "1", "--tensor-parallel", "2")
    with Stack(tmp_path_factory.mktemp("stack"), *flags, program=("tests.e2e.impatient_up",)).running() as running:
        yield running


@pytest.mark.parametrize("name", ["redis", "speculator", "verifier", "gateway"])
def test_a_hung_service_is_restarted_and_answers_again(name: str, stack: Stack) -> None:
    whole = stack.complete()
    before = stack.pids()
    module = name if name == "redis" else f"services.{name}"
    group = [before[module], *children_of(before[module])]
    os.kill(before[module], signal.SIGSTOP)
    stack.wait(lambda: stack.pids().get(module, before[module]) != before[module])
    assert re.search(rf"{name} runs but did not answer for [\d.]+ s; it is killed", stack.log.read_text())
    assert not any(map(alive, group)), "also the other ranks"
    stack.wait(lambda: stack.log.read_text().count(f"{name} is ready after") == 2)
    stack.wait(lambda: httpx.get(f"{stack.url}/ready").status_code == 200)
    assert stack.complete() == whole
    assert {each: pid for each, pid in stack.pids().items() if each != module} == {
        each: pid for each, pid in before.items() if each != module
    }


def test_a_stream_outlives_a_hung_verifier(stack: Stack) -> None:
    whole = stack.complete(150)
    stream = stack.client.completions.create(
        model="default-llm", prompt=PROMPT, max_tokens=150, temperature=0, stream=True
    )
    pieces = [next(stream).choices[0].text]
    os.kill(stack.pids()["services.verifier"], signal.SIGSTOP)
    pieces += [event.choices[0].text for event in stream]
    assert "".join(pieces) == whole
