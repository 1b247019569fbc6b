"""The `specserve` command with the real services and a model of random weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.gateway.api_keys import hash_key
from tests.tiny_models import write_model, write_relative

TIMEOUT_S = 60.0
SPECSERVE = (sys.executable, "-m", "services.launcher.main")


def specserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SPECSERVE, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    llm = write_model(folder / "tiny-llm")
    return llm, write_relative(folder / "tiny-ssm", llm, noise=0.1)


Running = tuple[subprocess.Popen[str], str]
"""The process of `specserve up`, and the URL of its API."""


@contextmanager
def started(*flags: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [*SPECSERVE, "up", *flags, "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SPECSERVE_VERIFIER_DRAFT_ALWAYS": "true"},  # drafts for so small a model do not pay
    )
    assert process.stdout is not None
    try:
        banner = "".join(iter(process.stdout.readline, "  print(answer.choices[0].text)\n"))
        match = re.search(r"SpecServe is ready: (http://\S+)/v1  \(model tiny-llm;", banner)
        assert match is not None, process.communicate(timeout=TIMEOUT_S)
        yield process, match[1]
    finally:
        process.kill()  # its watchdog ends the services
        process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def up(models: tuple[Path, Path], free_port: Callable[[], int]) -> Iterator[Running]:
    llm, ssm = models
    with started("--llm", str(llm), "--ssm", str(ssm), "--port", str(free_port())) as running:
        yield running


def cost(url: str) -> tuple[int, int]:
    """Tokens and LLM steps of a completion."""
    done = specserve("complete", "the cat sat", "--url", url, "--max-tokens", "24")
    assert done.returncode == 0, done.stderr
    match = re.search(r"(\d+) tokens, (\d+) LLM steps", done.stderr)
    assert match is not None, done.stderr
    return int(match[1]), int(match[2])


def stopped(process: subprocess.Popen[str]) -> str:
    """Stop it as Ctrl-C does; what it told."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "killed" not in err
    return err


def test_up_complete_and_ctrl_c(up: Running) -> None:
    process, url = up
    done = specserve("complete", "the cat sat", "--url", url, "--max-tokens", "24")
    assert done.returncode == 0, done.stderr
    cost = re.search(r"(\d+) tokens, (\d+) LLM steps \((\d+\.\d\d) tokens/step\), first text after", done.stderr)
    assert cost is not None, done.stderr
    tokens, steps = int(cost[1]), int(cost[2])
    assert 0 < tokens <= 24
    assert 0 < steps < tokens  # a relative of the large model drafts for it
    assert done.stdout.strip("\n")

    refused = specserve("complete", "the cat sat", "--url", url, "--model", "other")
    assert refused.returncode == 1
    assert "404" in refused.stderr
    assert "other" in refused.stderr

    assert re.search(r"gateway: stopped(.|\n)*verifier: stopped", stopped(process))


def test_up_without_a_small_model_looks_drafts_up(models: tuple[Path, Path], free_port: Callable[[], int]) -> None:
    with started("--llm", str(models[0]), "--port", str(free_port())) as (process, url):
        first, second = cost(url), cost(url)
        assert first[0] == second[0]
        assert second[1] < first[1], "the second finds the first one's output"
        assert stopped(process)


def test_up_with_a_process_for_the_speculator(models: tuple[Path, Path], free_port: Callable[[], int]) -> None:
    llm, ssm = map(str, models)
    with started("--llm", llm, "--ssm", ssm, "--speculator-process", "--port", str(free_port())) as (process, url):
        tokens, steps = cost(url)
        assert steps < tokens
        err = stopped(process)
    assert "speculator is ready" in err
    assert re.search(r"gateway: stopped(.|\n)*verifier: stopped(.|\n)*speculator: stopped", err)


def test_up_with_a_speculator_for_each_small_model(models: tuple[Path, Path], free_port: Callable[[], int]) -> None:
    llm, ssm = map(str, models)
    flags = ("--llm", llm, "--ssm", ssm, "--ssm", llm, "--speculator-per-ssm", "--port", str(free_port()))
    with started(*flags) as (process, url):
        tokens, steps = cost(url)
        assert steps < tokens  # drafted by one of them; on a busy machine not in every step
        err = stopped(process)
    assert all(f"speculator-{number} is ready" in err for number in (1, 2))
    assert len(re.findall(r"speculator connected.*", err)) == 2


def test_a_model_with_another_tokenizer_stops_the_start_with_one_line(
    models: tuple[Path, Path], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    stranger = write_model(tmp_path / "stranger", tokenizer_seed="other")
    done = specserve("up", "--llm", str(models[0]), "--ssm", str(stranger), "--port", str(free_port()))
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "verifier ended at its start" in error
    assert "tokenizer" in error


def test_a_truncated_model_stops_the_start_with_one_line(
    models: tuple[Path, Path], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    broken = write_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    done = specserve("up", "--llm", str(broken), "--no-speculator", "--port", str(free_port()))
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "broken" in error
    assert "Traceback" not in done.stderr


def test_bad_settings_are_one_line_and_exit_code_2(free_port: Callable[[], int]) -> None:
    done = specserve("up", "--llm", "/nowhere")
    assert (done.returncode, done.stderr) == (
        2,
        "error: model /nowhere: no such folder; give a folder with config.json or a hub id\n",
    )
    silent = specserve("complete", "hello", "--url", f"http://127.0.0.1:{free_port()}")
    assert silent.returncode == 1
    assert "specserve up" in silent.stderr


def test_hash_key_makes_and_hashes_keys() -> None:
    made = specserve("hash-key", "--new")
    key = made.stderr.split()[-1]
    again = subprocess.run(
        [*SPECSERVE, "hash-key"], input=key + "\n", capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert made.stdout == again.stdout == hash_key(key) + "\n"
    short = subprocess.run([*SPECSERVE, "hash-key"], input="secret", capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (short.returncode, short.stdout) == (2, "")
    assert "secret" not in short.stderr
