"""`specserve up` as a user runs it, and the OpenAI SDK against it: completions, kills in the middle, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from services.launcher.settings import EMBEDDED_LLM, EMBEDDED_SSMS
from tests.ports import free_port

START_TIMEOUT_S = 120.0
PROMPT = "Once upon a time, there was a little girl who"


class Stack:
    """A running `specserve up`, or another program with its flags."""

    def __init__(self, folder: Path, *flags: str, program: tuple[str, ...] = ("services.launcher.main", "up")) -> None:
        self.port = free_port()
        self.log = folder / "log"
        command = [sys.executable, "-m", *program, "--port", str(self.port), *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @contextmanager
    def running(self) -> Iterator[Stack]:
        """Ready inside the context, stopped behind it."""
        try:
            self.wait_ready()
            yield self
        finally:
            self.process.terminate()
            self.process.wait(60)

    def wait_ready(self) -> None:
        self.wait(lambda: "SpecServe is ready" in self.log.read_text(), START_TIMEOUT_S)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def pids(self) -> dict[str, int]:
        """Process ids of the services that run now, by module."""
        found: dict[str, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int(re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())[1])  # type: ignore[index]  # every status has it
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == self.process.pid:
                modules = [word for word in command if word.startswith(b"services.")]
                found[modules[0].decode() if modules else "redis"] = int(folder.name)
        return found

    def complete(self, tokens: int = 40) -> str:
        answer = self.client.completions.create(model="default-llm", prompt=PROMPT, max_tokens=tokens, temperature=0)
        return answer.choices[0].text

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def children_of(pid: int) -> list[int]:
    """The processes that a service has started, as rank 0 of a verifier the other ranks."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), "--threads", "1").running() as running:
        yield running


def test_streamed_and_whole_completions_agree(stack: Stack) -> None:
    whole = stack.complete()
    stream = stack.client.completions.create(
        model="default-llm", prompt=PROMPT, max_tokens=40, temperature=0, stream=True
    )
    assert "".join(event.choices[0].text for event in stream) == whole
    assert len(whole.split()) > 15


def test_a_seed_fixes_the_text(stack: Stack) -> None:
    def sample(seed: int) -> list[str]:
        answer = stack.client.completions.create(
            model="default-llm", prompt=PROMPT, max_tokens=30, temperature=1, seed=seed, n=3
        )
        return [choice.text for choice in answer.choices]

    assert sample(1) == sample(1)
    assert len({*sample(1), *sample(2)}) == 6


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
def test_a_request_without_speculation_gets_the_same_text(sampling: dict[str, int], stack: Stack) -> None:
    texts, steps = [], []
    for speculative in (True, False):
        answer = stack.client.completions.create(
            model="default-llm", prompt=PROMPT, max_tokens=60, extra_body={"speculative": speculative, **sampling}
        )
        assert answer.usage is not None
        assert answer.usage.model_extra is not None
        texts.append(answer.choices[0].text)
        steps.append(answer.usage.model_extra["llm_steps"])
    assert texts[0] == texts[1]
    assert steps[0] < steps[1] == 60


def test_a_bad_request_is_named(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        stack.client.completions.create(model="default-llm", prompt=PROMPT, max_tokens=100_000)
    assert caught.value.param == "max_tokens"


@pytest.fixture(scope="module")
def stack_of_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("processes"), "--threads", "1", "--speculator-process").running() as running:
        yield running


@pytest.mark.parametrize("service", ["services.speculator", "services.verifier"])
def test_a_service_killed_in_the_middle_changes_no_text(service: str, stack_of_processes: Stack) -> None:
    _survives(service, stack_of_processes)


def test_a_verifier_killed_with_its_speculator_changes_no_text(stack: Stack, stack_of_processes: Stack) -> None:
    _survives("services.launcher.one_process", stack)
    assert stack.complete(400) == stack_of_processes.complete(400)


def _survives(service: str, stack: Stack) -> None:
    """A stream whose service is killed has the same text, and the service comes back."""
    whole = stack.complete(400)
    pid = stack.pids()[service]
    stream = stack.client.completions.create(
        model="default-llm", prompt=PROMPT, max_tokens=400, temperature=0, stream=True
    )
    pieces = [next(stream).choices[0].text]
    os.kill(pid, signal.SIGKILL)
    pieces += [event.choices[0].text for event in stream]
    assert "".join(pieces) == whole
    stack.wait(lambda: stack.pids().get(service, pid) != pid)
    stack.wait(lambda: httpx.get(f"{stack.url}/ready").status_code == 200)
    assert stack.complete(400) == whole


def test_a_rank_killed_in_the_middle_changes_no_text(tmp_path: Path) -> None:
    flags = ("--tensor-parallel", "2", "--pipeline-parallel", "2")
    with Stack(tmp_path, "--threads", "1", *flags).running() as stack:
        verifier = stack.pids()["services.verifier"]
        ranks = children_of(verifier)
        assert len(ranks) == 3, "rank 0 has started the others"
        whole = stack.complete(150)
        stream = stack.client.completions.create(
            model="default-llm", prompt=PROMPT, max_tokens=150, temperature=0, stream=True
        )
        pieces = [next(stream).choices[0].text]
        os.kill(ranks[-1], signal.SIGKILL)
        pieces += [event.choices[0].text for event in stream]
        assert "".join(pieces) == whole
        assert stack.pids()["services.verifier"] != verifier, "the group is another one"
        assert "group failed" in stack.log.read_text() or "rank 3 of 4" in stack.log.read_text()


def test_specserve_complete_streams_into_the_terminal(stack: Stack) -> None:
    command = [sys.executable, "-m", "services.launcher.main", "complete", PROMPT, "--url", stack.url]
    shown = subprocess.run(
        [*command, "--max-tokens", "40", "--temperature", "0"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert stack.complete().split()[0] in shown.stdout
    assert "tokens/step" in shown.stdout + shown.stderr


def test_ctrl_c_ends_everything_and_leaves_nothing(tmp_path: Path) -> None:
    stack = Stack(tmp_path, "--threads", "1")
    stack.wait_ready()
    pids = stack.pids()
    assert set(pids) == {"redis", "services.launcher.one_process", "services.gateway"}
    assert stack.interrupt() in (0, 130)
    assert not [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()]
    with pytest.raises(httpx.ConnectError):
        httpx.get(stack.url)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: _change_tokenizer(folder), "tokenizer"),
    ],
)
def test_a_model_that_cannot_be_served_stops_the_start_with_one_line(
    damage: Callable[[Path], None], complaint: str, tmp_path: Path
) -> None:
    ssm = Path(shutil.copytree(EMBEDDED_SSMS[0], tmp_path / "ssm"))
    damage(ssm)
    stack = Stack(tmp_path, "--threads", "1", "--llm", EMBEDDED_LLM, "--ssm", str(ssm))
    assert stack.process.wait(START_TIMEOUT_S) in (1, 2)
    last = stack.log.read_text().strip().splitlines()
    assert any(complaint in line for line in last[-8:])
    assert "Traceback" not in stack.log.read_text()


def _change_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
