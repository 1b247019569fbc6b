"""Speculators that are absent, slow, hung, forgetful or wrong cost speed and no token."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2 import SpeculateResponse
from services.common.model_facts import ModelFacts
from services.common.tls import INSECURE
from services.common.tree_wire import trees_to_wire
from services.verifier import speculator_link
from services.verifier.metrics import VerifierMetrics
from services.verifier.outbox import Outbox
from speculation.tree import TokenTree
from tests.ports import free_port
from tests.services.harness import Services
from tests.services.verifier.scripted_speculator import Answer, Recorder, scripted_speculator, wait_until
from tests.tiny_models import VOCAB, hugging_face_greedy

PROMPT = [5, 17, 60, 3]


def _draft(message: speculator_pb2.SpeculateRequest, *token_ids: int, **columns: Any) -> SpeculateResponse:
    """The same chain for every sequence, with other columns in place of its own."""
    ids, size = message.draft.sequence_ids, len(token_ids)
    chain: dict[str, Any] = {"token_ids": token_ids, "parents": range(-1, size - 1)}
    trees = tree_pb2.TokenTrees()
    for _ in ids:
        trees.MergeFrom(tree_pb2.TokenTrees(sizes=[size], sources=["x"], estimated=[False], **(chain | columns)))
    return SpeculateResponse(step=message.step, sequence_ids=ids, trees=trees)


def _hang(message: speculator_pb2.SpeculateRequest) -> SpeculateResponse:
    time.sleep(1.5)
    return SpeculateResponse(step=message.step)


GARBAGE: dict[str, tuple[str, Answer]] = {
    "hang": ("late", _hang),
    "cycle": ("invalid", lambda m: _draft(m, 3, 4, 5, parents=[-1, 2, 1])),
    "sizes": ("invalid", lambda m: _draft(m, 3, 4, 5, parents=[-1, 0])),
    "empty": ("invalid", lambda m: _draft(m)),
    "vocabulary": ("invalid", lambda m: _draft(m, 3, VOCAB)),
    "another root": ("invalid", lambda m: _draft(m, 299, 4)),
    "over budget": ("invalid", lambda m: _draft(m, *range(100))),
    "distributions": ("invalid", lambda m: _draft(m, 3, sampled_nodes=[0], distributions=b"x")),
    "more sequences": ("invalid", lambda m: SpeculateResponse(step=m.step, sequence_ids=m.draft.sequence_ids)),
    "future step": ("invalid", lambda m: SpeculateResponse(step=m.step + 7)),
    "another sequence": (
        "invalid",
        lambda m: SpeculateResponse(step=m.step, sequence_ids=[10**6], trees=trees_to_wire([TokenTree.root_only(3)])),
    ),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_speculator_that_hangs_or_sends_garbage_costs_speed_only(garbage: str, llm: Path, running: Services) -> None:
    reason, answer = GARBAGE[garbage]
    with scripted_speculator(llm, Recorder(answer)) as address:
        verifier = running.verifier(llm, address, draft_timeout_ms=200)
        generated = verifier.generate(PROMPT, 30)
        assert generated.token_ids[:20] == hugging_face_greedy(llm, PROMPT, 20)
        assert verifier.metric("speculator_failures_total", speculator=address, reason=reason) >= 1
        assert verifier.metric("draft_tokens_total") == 0


def test_a_slow_speculator_drafts_again_once_it_has_answered(llm: Path, running: Services) -> None:
    slow = [True]

    def answer(message: speculator_pb2.SpeculateRequest) -> SpeculateResponse:
        if message.HasField("draft") and slow.pop() if slow else False:
            time.sleep(0.3)  # a long prompt
        return SpeculateResponse(step=message.step)

    recorder = Recorder(answer)
    with scripted_speculator(llm, recorder) as address:
        verifier = running.verifier(llm, address, draft_timeout_ms=20)
        verifier.generate(PROMPT, 5)
        assert verifier.metric("speculator_failures_total", speculator=address, reason="late") == 1
        assert verifier.metric("speculator_up", speculator=address) == 1
        time.sleep(0.4)
        verifier.generate(PROMPT, 5)
        assert verifier.metric("speculator_failures_total", speculator=address, reason="late") == 1
        assert len(set(recorder.opened)) == 2


def test_a_hung_speculator_is_connected_again(llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculator_link, "HUNG_AFTER_S", 0.2)
    with scripted_speculator(llm, Recorder(_hang)) as address:
        verifier = running.verifier(llm, address, draft_timeout_ms=20)
        verifier.generate(PROMPT, 5)
        time.sleep(0.3)
        verifier.generate(PROMPT, 5)
        assert verifier.metric("speculator_failures_total", speculator=address, reason="hung") == 1
        wait_until(lambda: verifier.metric("speculator_up", speculator=address) == 1)


def test_a_speculator_that_forgot_everything_is_told_again(llm: Path, running: Services) -> None:
    def forget(message: speculator_pb2.SpeculateRequest) -> SpeculateResponse:
        unknown = message.draft.sequence_ids
        return SpeculateResponse(step=message.step, unknown_sequence_ids=unknown)

    recorder = Recorder(forget)
    with scripted_speculator(llm, recorder) as address:
        verifier = running.verifier(llm, address)
        verifier.generate(PROMPT, 5)
        # The step for the last token drafts nothing: at most one token is left.
        assert len(recorder.opened) == 4
        assert len(set(recorder.opened)) == 1
        assert verifier.metric("speculator_up", speculator=address) == 1


def test_a_speculator_never_hears_of_a_request_without_speculation(llm: Path, running: Services) -> None:
    recorder = Recorder()
    with scripted_speculator(llm, recorder) as address:
        verifier = running.verifier(llm, address)
        verifier.generate([1, 2, 3], 12, speculative=False)
        assert (recorder.opened, recorder.closed) == ([], [])
        verifier.generate([1, 2, 3], 12, speculative=True)
        wait_until(lambda: recorder.closed == recorder.opened == [2])


def test_an_absent_speculator_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    facts = ModelFacts("llm", 320, 64, "0" * 64, (2,), "cpu", "float32", "native", 1)
    address = f"127.0.0.1:{free_port()}"

    async def wait() -> bool:
        outbox = Outbox(asyncio.get_running_loop())
        link = speculator_link.SpeculatorLink(address, INSECURE, facts, VerifierMetrics(CollectorRegistry()), outbox)
        async with link.connecting():
            return await link.wait_connected(1.0)

    assert not asyncio.run(wait())
    reasons = [vars(record)["reason"] for record in caplog.records if record.message == "speculator unreachable"]
    assert reasons
    assert all(reason.startswith("UNAVAILABLE: ") and "\n" not in reason for reason in reasons)
