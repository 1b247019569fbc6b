"""`specserve tune`, run as a command: killed, resumed, in several processes, and given nonsense."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.transformer import LoadOptions, Transformer
from speculation.calibration import Calibration
from tests.tiny_models import write_model, write_relative
from training.continuations import read_shard
from training.evaluation import evaluate

TIMEOUT_S = 240
OPTIONS = [
    "--new-tokens",
    16,
    "--segment",
    2,
    "--tokens",
    12_000,
    "--batch",
    8,
    "--threads",
    1,
    "--learning-rate",
    3e-4,
]
# Gloo looks for an address by the host's name otherwise, which not every machine resolves.
ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM, a relative of it, a model with another tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("tune")
    write_model(folder / "llm", scale=2.0)
    write_relative(folder / "relative", folder / "llm", noise=0.1)
    write_model(folder / "foreign", tokenizer_seed="other")
    prompts = [f"the {animal} sat on {number} mats" for animal in ("cat", "dog", "child") for number in range(24)]
    lines = [json.dumps({"prompt": prompt, "id": index}) for index, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(
    room: Path, out: str, *arguments: object, program: tuple[object, ...] = ("-m", "training.tune")
) -> list[str]:
    fixed = ["--llm", room / "llm", "--prompts", room / "prompts.jsonl", "--out", room / out]
    return [sys.executable, *map(str, (*program, *fixed, *OPTIONS, *arguments))]


def run(arguments: list[str], preexec: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=TIMEOUT_S, env=ENVIRONMENT, preexec_fn=preexec
    )


def weights(room: Path, out: str) -> list[bytes]:
    return [(room / out / name / "model.safetensors").read_bytes() for name in ("ssm-1", "ssm-2")]


@pytest.fixture(scope="module")
def whole(room: Path) -> subprocess.CompletedProcess[str]:
    """A run of two models that nobody disturbs."""
    done = run(command(room, "whole", "--ssm", room / "relative", "--ssm", "previous"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_run_leaves_folders_that_are_served(room: Path, whole: subprocess.CompletedProcess[str]) -> None:
    assert "ssm-1 to ssm-2 cover" in whole.stderr.replace("\n", " ")
    for name in ("ssm-1", "ssm-2"):
        folder = room / "whole" / name
        model = Transformer.load(folder, LoadOptions(device="cpu"))
        assert model.weight_dtype is torch.bfloat16
        assert (folder / "tokenizer.json").read_bytes() == (room / "llm" / "tokenizer.json").read_bytes()
        assert Calibration.read(folder) != Calibration()
        measured = json.loads((folder / "speculation.json").read_text())["measured"]
        assert measured["positions"] > 20
        card = (folder / "README.md").read_text()
        assert "| greedy |" in card
        assert "coverage of the continuations" in card


def test_tuning_teaches(room: Path, whole: subprocess.CompletedProcess[str]) -> None:
    texts = [
        text for shard in sorted((room / "whole").glob("continuations/*.safetensors")) for text in read_shard(shard)
    ]
    llm, before, after = (
        Transformer.load(folder, LoadOptions(device="cpu"))
        for folder in (room / "llm", room / "relative", room / "whole" / "ssm-1")
    )
    start, end = evaluate(llm, before, texts[:40]), evaluate(llm, after, texts[:40])
    assert end.greedy[0] > start.greedy[0] + 0.05
    assert end.overlap > start.overlap + 0.05


@pytest.mark.parametrize("moment", ["continuations/made-of.json", "ssm-1/checkpoints/last.pt", "ssm-1/README.md"])
def test_a_killed_run_goes_on_to_the_same_models(
    moment: str, room: Path, whole: subprocess.CompletedProcess[str]
) -> None:
    out = f"killed-{Path(moment).name}"
    arguments = command(room, out, "--ssm", room / "relative", "--ssm", "previous")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + TIMEOUT_S
    while not (room / out / moment).exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(TIMEOUT_S)
    assert not (room / out / "ssm-2" / "README.md").exists()
    resumed = run(arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(room, out) == weights(room, "whole")


def test_two_processes_tune_together(room: Path) -> None:
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "training.tune")
    done = run(command(room, "two", "--ssm", room / "relative", "--ssm", room / "relative", program=program))
    assert done.returncode == 0, done.stderr
    for name in ("ssm-1", "ssm-2"):
        held_out = json.loads((room / "two" / name / "training.json").read_text())["held_out"]
        assert held_out[-1]["value"] < 0.9
    assert done.stderr.count("ssm-1 to ssm-1 cover") == 1, "one process tells"


def test_without_boosting_each_model_learns_everything(room: Path) -> None:
    shared = ["--continuations", room / "whole" / "continuations", "--no-boost", "--ssm", room / "relative"]
    done = run(command(room, "independent", *shared))
    assert done.returncode == 0, done.stderr
    assert "without boosting" in (room / "independent" / "ssm-1" / "README.md").read_text()
    assert weights(room, "whole")[0] == (room / "independent" / "ssm-1" / "model.safetensors").read_bytes()


def test_bad_lines_are_named(room: Path) -> None:
    bad = room / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"text": "no prompt"}\n')
    done = run(command(room, "bad", "--ssm-size", "1x32", "--prompts", bad))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert 'bad.jsonl, line 2: got \'{"text": "no prompt"}\'; each line must be {"prompt": "some text"}' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ssm", "foreign"], "use one with the LLM's tokenizer"),
        (["--ssm-size", "two"], "give LAYERSxWIDTH, the width a multiple of 16, such as 2x192"),
        (["--ssm", "previous"], "there is none before the first SSM"),
        ([], "no SSM to tune; give --ssm FOLDER or --ssm-size LAYERSxWIDTH"),
        (["--ssm", "missing-folder/x/y"], "no such folder"),
        (["--ssm-size", "1x32", "--new-tokens", "256"], "the LLM's context is 256 tokens"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments: list[str], message: str, room: Path) -> None:
    given = [str(room / part) if (room / part).is_dir() else part for part in arguments]
    done = run(command(room, "refused", *given))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_other_settings_need_another_folder(room: Path, whole: subprocess.CompletedProcess[str]) -> None:
    done = run(command(room, "whole", "--ssm", room / "relative", "--ssm", "previous", "--learning-rate", "0.1"))
    assert done.returncode == 2
    assert "was begun with learning_rate = 0.0003, now it is 0.1" in done.stderr


def test_a_full_disk_is_told_and_survived(room: Path, whole: subprocess.CompletedProcess[str]) -> None:
    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    arguments = command(room, "full", "--ssm", room / "relative", "--ssm", "previous")
    failed = run(arguments, no_large_files)
    assert failed.returncode == 1
    assert "cannot be written: File too large; make room, then repeat the command" in failed.stderr
    assert failed.stderr.count("Traceback") == 0
    assert not list((room / "full").rglob("*.new")), "no half-written file is left"
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert weights(room, "full") == weights(room, "whole")


def test_help_teaches() -> None:
    done = run([sys.executable, "-m", "services.launcher.main", "tune", "--help"])
    assert done.returncode == 0
    for flag in ("--llm", "--ssm-size", "--prompts", "--segment", "--samples", "--no-boost"):
        assert flag in done.stdout
