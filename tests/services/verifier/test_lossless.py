"""Greedy output equals Hugging Face `generate` token for token, whatever drafts, batches or fails beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import free_port
from tests.services.harness import Services, Verifier
from tests.tiny_models import CONTEXT, SHAPES, VOCAB, hugging_face_greedy, write_model, write_relative

NEW_TOKENS = 40
END_OF_TEXT = 0


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def assert_lossless(verifier: Verifier, llm: Path, prompts: list[list[int]], at_once: int = 1) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        generated = list(
            pool.map(lambda prompt: verifier.generate(prompt, NEW_TOKENS, stop_token_ids=[END_OF_TEXT]), prompts)
        )
    for prompt, result in zip(prompts, generated, strict=True):
        assert result.token_ids == hugging_face_greedy(llm, prompt, NEW_TOKENS)
        assert result.llm_steps <= len(result.token_ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_family_with_best_first_trees(shape: str, tmp_path: Path, running: Services) -> None:
    llm = write_model(tmp_path / "llm", shape)
    ssm = write_relative(tmp_path / "ssm", llm, noise=0.05)
    verifier = running.verifier(llm, running.speculator(ssm))
    assert_lossless(verifier, llm, prompts(3))
    assert verifier.metric("accepted_tokens_total") > 0


def test_without_speculator(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm)
    assert_lossless(verifier, llm, prompts(4))
    assert verifier.metric("drafts_total") == 0
    assert verifier.metric("output_tokens_total") == verifier.metric("sequence_steps_total")


def test_an_int8_model_is_verified_as_it_decodes_plainly(llm: Path, ssms: list[Path], running: Services) -> None:
    plain = running.verifier(llm, dtype="int8")
    drafted = running.verifier(llm, running.speculator(ssms[0]), dtype="int8")
    for prompt in prompts(5):
        assert drafted.generate(prompt, NEW_TOKENS).token_ids == plain.generate(prompt, NEW_TOKENS).token_ids
    assert drafted.metric("accepted_tokens_total") > 0


@pytest.mark.parametrize("expansion", [{}, {"draft_width": (1, 1, 3, 1, 1)}, {"draft_width": (4,), "draft_nodes": 4}])
@pytest.mark.parametrize("models", [1, 3])
def test_static_and_best_first_trees_of_one_and_three_ssms(
    models: int, expansion: dict[str, Any], llm: Path, ssms: list[Path], running: Services
) -> None:
    verifier = running.verifier(llm, running.speculator(*ssms[:models]), **({"draft_nodes": 12} | expansion))
    assert_lossless(verifier, llm, prompts(5))
    assert verifier.metric("accepted_tokens_total") > 0
    sources = [verifier.metric("accepted_from_total", source=ssm.name) for ssm in ssms]
    assert [count > 0 for count in sources] == [index < models for index in range(3)]


@pytest.mark.parametrize("speculators", [1, 2])
def test_trees_of_different_calibrations_merged_and_cut(
    speculators: int, llm: Path, calibrated_ssms: list[Path], running: Services
) -> None:
    groups = [calibrated_ssms] if speculators == 1 else [[ssm] for ssm in calibrated_ssms]
    verifier = running.verifier(llm, *(running.speculator(*group) for group in groups), draft_nodes=6)
    assert_lossless(verifier, llm, prompts(5))
    unsure, sure = (verifier.metric("accepted_from_total", source=ssm.name) for ssm in calibrated_ssms)
    assert 0 < unsure < sure, "the surer one's nodes are kept"
    assert verifier.metric("draft_tokens_total") <= 6 * verifier.metric("drafts_total")


def test_three_speculators_for_one_verifier(llm: Path, ssms: list[Path], running: Services) -> None:
    verifier = running.verifier(llm, *(running.speculator(ssm) for ssm in ssms))
    assert_lossless(verifier, llm, prompts(5))
    assert all(verifier.metric("accepted_from_total", source=ssm.name) > 0 for ssm in ssms)


def test_prompts_longer_than_a_chunk_at_the_end_of_the_context(llm: Path, ssms: list[Path], running: Services) -> None:
    speculator = running.speculator(ssms[0], prefill_chunk=32)
    verifier = running.verifier(llm, speculator, prefill_chunk=24, max_step_rows=40)
    long = [prompt + prompts(1, 190)[0] for prompt in prompts(4, 20)]
    long.append(torch.randint(1, VOCAB, (CONTEXT - NEW_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist())
    assert max(map(len, long)) > 4 * 24
    assert_lossless(verifier, llm, long, at_once=3)


def test_sixteen_requests_at_once(llm: Path, ssms: list[Path], running: Services) -> None:
    verifier = running.verifier(llm, running.speculator(*ssms[:2]))
    assert_lossless(verifier, llm, prompts(16, 60), at_once=16)
    assert verifier.metric("accepted_tokens_total") > 0


def test_too_little_kv_memory_for_all_preempts_and_stays_lossless(
    llm: Path, ssms: list[Path], running: Services
) -> None:
    # One full context and its largest tree are 32 blocks; 16 sequences of up to 100 tokens would take 112.
    verifier = running.verifier(llm, running.speculator(ssms[0]), max_sequences=16, kv_blocks=32)
    assert_lossless(verifier, llm, prompts(16, 60), at_once=16)
    assert verifier.metric("preemptions_total") > 0


def test_a_speculator_killed_in_the_middle_costs_speed_only(llm: Path, ssms: list[Path], running: Services) -> None:
    port = free_port()
    command = [sys.executable, "-m", "services.speculator", "--insecure", "--ssm", str(ssms[0]), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        verifier = running.verifier(llm, f"127.0.0.1:{port}", speculator_wait_s=60)
        address = f"127.0.0.1:{port}"
        assert_lossless(verifier, llm, prompts(2))
        drafts = verifier.metric("drafts_total")
        assert drafts > 0
        with ThreadPoolExecutor(1) as pool:
            running_requests = pool.submit(assert_lossless, verifier, llm, prompts(12), at_once=4)
            _wait(lambda: verifier.metric("drafts_total") > drafts)
            os.kill(process.pid, signal.SIGKILL)
            running_requests.result(120)
        assert verifier.metric("speculator_up", speculator=address) == 0
        assert verifier.metric("speculator_failures_total", speculator=address, reason="unavailable") >= 1
        _restart_and_see_drafts_again(verifier, llm, ssms[0], port, running)
    finally:
        process.kill()
        process.wait(10)


def _restart_and_see_drafts_again(verifier: Verifier, llm: Path, ssm: Path, port: int, running: Services) -> None:
    running.speculator(ssm, port=port)
    _wait(lambda: verifier.metric("speculator_up", speculator=f"127.0.0.1:{port}") == 1)
    drafts = verifier.metric("drafts_total")
    assert_lossless(verifier, llm, prompts(2))
    assert verifier.metric("drafts_total") > drafts


def _wait(condition: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
