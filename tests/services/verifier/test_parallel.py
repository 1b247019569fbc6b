"""A verifier of several ranks: the text of one process, and what happens when a rank dies or hangs, never silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.configurations import MIXED_PROMPTS
from protos import verifier_pb2
from services.common.grpc_setup import channel
from services.common.prompt_files import read_prompts
from services.common.tls import INSECURE
from services.launcher.settings import EMBEDDED_LLM, EMBEDDED_SSMS
from tests.ports import free_port
from tests.services.harness import Begun, SequenceFailed, Services, request
from tests.services.verifier.rank_processes import START_TIMEOUT_S, RankedVerifier, ranked_verifier, wait_until
from tests.services.verifier.test_lossless import assert_lossless, prompts
from tests.tiny_models import hugging_face_greedy, write_model, write_relative

PROMPT = [5, 17, 60, 3]
LONG = 220
RANK_TIMEOUT_S = 4.0
# A hung rank is noticed after its timeout; the process that ends then has this long for it on a busy machine.
END_S = 20.0
# A death is seen by the end of a connection, whatever the timeout (30 s by default).
DEATH_S = 5.0


@pytest.fixture(scope="module")
def wide_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Divides among four ranks, each two of which have one KV head."""
    return write_model(tmp_path_factory.mktemp("wide") / "llm", "llama-gqa", num_attention_heads=8)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_sixteen_requests_at_once_with_drafts(
    tensor: int, pipeline: int, wide_llm: Path, tmp_path: Path, running: Services
) -> None:
    ssm = write_relative(tmp_path / "ssm", wide_llm, noise=0.06)
    flags = (f"--tensor-parallel={tensor}", f"--pipeline-parallel={pipeline}")
    with ranked_verifier(wide_llm, tmp_path, *flags, f"--speculator={running.speculator(ssm)}") as verifier:
        assert len(verifier.pids()) == tensor * pipeline - 1, "rank 0 is the process that was started"
        assert_lossless(verifier, wide_llm, prompts(16, 60), at_once=16)
        generated = verifier.generate(PROMPT, 40)
        assert generated.llm_steps < len(generated.token_ids), "drafts are accepted"
        verifier.process.send_signal(signal.SIGTERM)
        assert verifier.process.wait(END_S) == 0, verifier.log
        assert not verifier.pids(), "every rank ends with rank 0"


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_the_embedded_model(tensor: int, pipeline: int, tmp_path: Path, running: Services) -> None:
    llm = Path(EMBEDDED_LLM)
    flags = (f"--tensor-parallel={tensor}", f"--pipeline-parallel={pipeline}", "--dtype=float32")
    speculator = running.speculator(Path(EMBEDDED_SSMS[0]))
    with ranked_verifier(llm, tmp_path, *flags, f"--speculator={speculator}") as verifier:
        tokenizer = Tokenizer.from_file(str(llm / "tokenizer.json"))
        texts = [tokenizer.encode(prompt).ids for prompt in read_prompts(MIXED_PROMPTS)[:16]]
        assert_lossless(verifier, llm, texts, at_once=16)


@contextmanager
def in_flight(verifier: RankedVerifier) -> Iterator[Iterator[verifier_pb2.SequenceOutput]]:
    """What is to come of a sequence that has begun to stream."""
    with channel(verifier.address, INSECURE) as connection:
        outputs = Begun(connection, request(PROMPT, LONG)).outputs()
        next(outputs)
        yield outputs


def assert_stopping(outputs: Iterator[verifier_pb2.SequenceOutput], verifier: RankedVerifier) -> str:
    with pytest.raises(SequenceFailed) as caught:
        list(outputs)
    assert caught.value.reason == verifier_pb2.FAILURE_REASON_STOPPING, (caught.value, verifier.log)
    return str(caught.value)


def test_a_hung_rank_ends_the_group_within_its_timeout(wide_llm: Path, tmp_path: Path) -> None:
    flags = ("--tensor-parallel=2", f"--rank-timeout-s={RANK_TIMEOUT_S}")
    with ranked_verifier(wide_llm, tmp_path, *flags) as verifier:
        time.sleep(1.2 * RANK_TIMEOUT_S)  # nothing to do is no failure
        with in_flight(verifier) as outputs:
            started = time.monotonic()
            verifier.signal(1, signal.SIGSTOP)
            details = assert_stopping(outputs, verifier)
        assert time.monotonic() - started < RANK_TIMEOUT_S + 3
        assert details == "rank 1 of 2 (stage 0, tensor rank 1) has been silent for 4 s"
        assert verifier.process.wait(END_S) == 1
        assert details in verifier.log
        assert not verifier.pids(), "a stopped rank does not outlive rank 0"


def test_a_dead_rank_ends_the_group_at_once(wide_llm: Path, tmp_path: Path) -> None:
    with ranked_verifier(wide_llm, tmp_path, "--pipeline-parallel=2") as verifier, in_flight(verifier) as outputs:
        started = time.monotonic()
        verifier.signal(1, signal.SIGKILL)
        details = assert_stopping(outputs, verifier)
        assert time.monotonic() - started < DEATH_S
        assert details.startswith("rank 1 of 2 (stage 1, tensor rank 0) has")
        assert verifier.process.wait(END_S) == 1
        assert details in verifier.log


def test_a_rank_that_dies_at_its_start_is_named(wide_llm: Path, tmp_path: Path) -> None:
    with ranked_verifier(wide_llm, tmp_path, "--tensor-parallel=2", wait=False) as verifier:
        wait_until(lambda: 1 in verifier.pids(), START_TIMEOUT_S)
        verifier.signal(1, signal.SIGKILL)
        assert verifier.process.wait(END_S) == 1
        assert verifier.log.splitlines()[-1] == "verifier: rank 1 ended at its start with signal 9"


def test_the_others_end_when_rank_0_hangs(wide_llm: Path, tmp_path: Path) -> None:
    flags = ("--tensor-parallel=2", f"--rank-timeout-s={RANK_TIMEOUT_S}")
    with ranked_verifier(wide_llm, tmp_path, *flags) as verifier:
        verifier.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: not verifier.pids(), RANK_TIMEOUT_S + END_S)
        assert "rank 0 of 2 (stage 0, tensor rank 0) has been silent for 4 s" in verifier.log
        verifier.process.send_signal(signal.SIGCONT)
        assert verifier.process.wait(END_S) == 1


def test_without_rank_0_the_others_end(wide_llm: Path, tmp_path: Path) -> None:
    with ranked_verifier(wide_llm, tmp_path, "--pipeline-parallel=2") as verifier:
        assert verifier.pids().keys() == {1}
        verifier.process.kill()
        verifier.process.wait()
        wait_until(lambda: not verifier.pids(), END_S)
        assert "rank 0 of 2 (stage 0, tensor rank 0)" in verifier.log


def test_torchrun_starts_a_group_again_after_a_rank_has_died(wide_llm: Path, tmp_path: Path) -> None:
    torchrun = ("--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1")
    with ranked_verifier(wide_llm, tmp_path, "--tensor-parallel=2", torchrun=torchrun) as verifier:
        expected = hugging_face_greedy(wide_llm, PROMPT, 40)
        with in_flight(verifier) as outputs:
            verifier.signal(1, signal.SIGKILL)
            assert "rank 1 of 2 (stage 0, tensor rank 1) has" in assert_stopping(outputs, verifier)
        first = verifier.log.count("group joined")
        wait_until(lambda: verifier.log.count("group joined") == first + 2, 60)
        verifier.wait_ready()
        assert verifier.generate(PROMPT, 40).token_ids[: len(expected)] == expected


@pytest.mark.parametrize(
    ("flags", "environ", "complaint"),
    [
        (("--tensor-parallel=3",), {}, "8 heads, 2 KV heads and 100 intermediate units divides by 1, 2 or 4"),
        (("--pipeline-parallel=5",), {}, "pipeline_parallel is 5; 2 layers have 1 to 2 stages"),
        ((), {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "2 ranks were started"),
        ((), {"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set, but MASTER_ADDR is not"),
        ((), {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 'one'"),
    ],
)
def test_ranks_that_cannot_start_say_why_in_one_line(
    flags: tuple[str, ...], environ: dict[str, str], complaint: str, wide_llm: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "services.verifier",
        "--insecure",
        f"--llm={wide_llm}",
        f"--port={free_port()}",
        *flags,
    ]
    ended = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert complaint in line


def test_ranks_that_were_not_started_alike_say_so(wide_llm: Path) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "services.verifier", "--insecure", f"--llm={wide_llm}", f"--port={free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, "--tensor-parallel=2", f"--kernels={kernels}"],
            env=os.environ | meeting | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, kernels in enumerate(("native", "torch"))
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], errors
    assert all("rank 1 has kernels torch, rank 0 has native; start them alike" in error for error in errors), errors


def test_ranks_but_the_first_need_no_service_libraries() -> None:
    program = (
        "import sys, services.verifier.worker\n"
        "assert not {'grpc', 'fastapi', 'pydantic', 'redis', 'uvicorn', 'httpx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
