"""What bad requests, full queues, leaving clients and broken speculators do: an error or lost speed, never a hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prometheus_client import CollectorRegistry

from protos import speculator_pb2, tree_pb2, verifier_pb2
from protos.speculator_pb2_grpc import SpeculatorServicer, add_SpeculatorServicer_to_server
from runtime.transformer import Transformer
from services.common.grpc_setup import channel
from services.common.lifecycle import StartupError
from services.common.model_facts import ModelFacts
from services.common.model_files import tokenizer_hash
from services.common.tls import INSECURE
from services.verifier import speculator_link
from services.verifier.budget import WholeDrafts
from services.verifier.engine import Engine
from services.verifier.metrics import VerifierMetrics
from services.verifier.outbox import Outbox
from services.verifier.runner import Runner
from tests.ports import free_port
from tests.services.harness import Begun, SequenceFailed, Services, Verifier, request, services
from tests.tiny_models import CONTEXT, VOCAB, hugging_face_greedy, write_model

PROMPT = [5, 17, 60, 3]
TIMEOUT_S = 30


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [VOCAB]}, f"token id {VOCAB} is outside the vocabulary 0..{VOCAB - 1}"),
        ({"new_tokens": CONTEXT}, f"exceed the context of {CONTEXT} tokens"),
        ({"new_tokens": 0}, "nothing to do"),
        ({"generated_token_ids": [1] * 9}, "9 generated tokens exceed max_new_tokens 8"),
        ({"stop_token_ids": [9999]}, "token id 9999 is outside"),
        ({"sampling": {"temperature": -1.0}}, "temperature is -1.0"),
        ({"sampling": {"temperature": float("nan")}}, "temperature is nan"),
        ({"sampling": {"top_p": 0.0}}, "top_p is 0.0"),
        ({"sampling": {"logit_bias": {3: 1000.0}}}, "logit_bias of token 3 is 1000.0"),
        ({"sampling": {"logit_bias": {VOCAB: 1.0}}}, f"token id {VOCAB} is outside"),
        ({"top_logprobs": VOCAB + 1}, "top_logprobs is"),
    ],
)
def test_a_request_that_can_never_run(fields: dict[str, Any], complaint: str, shared_verifier: Verifier) -> None:
    values: dict[str, Any] = {"prompt": PROMPT, "new_tokens": 8} | fields
    with pytest.raises(SequenceFailed) as caught:
        shared_verifier.generate(**values)
    assert caught.value.reason == verifier_pb2.FAILURE_REASON_INVALID
    assert complaint in str(caught.value)


def test_a_full_queue_says_when_to_try_again(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, max_sequences=1, max_waiting=2)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(_outcome, verifier) for _ in range(8)]
        outcomes = [call.result(TIMEOUT_S) for call in calls]
    refused = [error for error in outcomes if isinstance(error, SequenceFailed)]
    assert 0 < len(refused) < 8
    for error in refused:
        assert error.reason == verifier_pb2.FAILURE_REASON_QUEUE_FULL
        assert 100 <= error.retry_after_ms <= 30_000
    expected = hugging_face_greedy(llm, PROMPT, 150)
    assert all(
        len(tokens) == 150 and tokens[: len(expected)] == expected for tokens in outcomes if tokens not in refused
    )


def _outcome(verifier: Verifier) -> Any:
    try:
        return verifier.generate(PROMPT, 150).token_ids
    except SequenceFailed as error:
        return error


def test_a_cancelled_call_frees_its_kv_and_its_draft_session(llm: Path, ssms: list[Path], running: Services) -> None:
    recorder = Recorder()
    with scripted_speculator(llm, recorder) as address:
        verifier = running.verifier(llm, address)
        free = verifier.metric("kv_free_blocks")
        with channel(verifier.address, INSECURE) as connection:
            sequence = Begun(connection, request(PROMPT, 200))
            next(sequence.outputs())
            sequence.cancel()
            _wait(lambda: verifier.metric("requests_total", outcome="cancelled") == 1)
        steps = verifier.metric("sequence_steps_total")
        _wait(lambda: recorder.closed == recorder.opened != [])
        time.sleep(0.05)
        assert verifier.metric("sequence_steps_total") == steps < 200, "no step is spent on it any more"
        verifier.generate(PROMPT, 3)
        assert verifier.metric("kv_free_blocks") >= free


def test_a_speculator_never_hears_of_a_request_without_speculation(llm: Path, running: Services) -> None:
    recorder = Recorder()
    with scripted_speculator(llm, recorder) as address:
        verifier = running.verifier(llm, address)
        verifier.generate([1, 2, 3], 12, speculative=False)
        assert (recorder.opened, recorder.closed) == ([], [])
        verifier.generate([1, 2, 3], 12, speculative=True)
        _wait(lambda: recorder.closed == recorder.opened == [2])


def test_everything_cancelled_between_two_steps_fails_nobody(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, max_sequences=2)
    expected = hugging_face_greedy(llm, PROMPT, 5)
    with channel(verifier.address, INSECURE) as connection, ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            sequences = [Begun(connection, request(PROMPT, 200)) for _ in range(2)]
            following = pool.submit(verifier.generate, PROMPT, 5)
            for sequence in sequences:
                next(sequence.outputs())
                sequence.cancel()
            assert following.result(TIMEOUT_S).token_ids[: len(expected)] == expected
    # A call may have ended before its cancellation came, and the last ones may come any moment.
    deadline = time.monotonic() + TIMEOUT_S
    while sum(counts := _outcomes(verifier, "cancelled", "length")) < 60:
        assert time.monotonic() < deadline, counts
        time.sleep(0.01)
    assert verifier.metric("requests_total", outcome="failed") == 0
    assert counts[0] > 30, "cancelled"


def _outcomes(verifier: Verifier, *outcomes: str) -> list[float]:
    return [verifier.metric("requests_total", outcome=outcome) for outcome in outcomes]


def test_a_failing_step_fails_its_requests_and_no_others(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = running.verifier(llm)
    whole = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(SequenceFailed, match="out of memory") as caught:
        verifier.generate(PROMPT, 8)
    assert caught.value.reason == verifier_pb2.FAILURE_REASON_INTERNAL
    monkeypatch.setattr(Transformer, "forward", whole)
    assert verifier.generate(PROMPT, 8).token_ids == hugging_face_greedy(llm, PROMPT, 8)


def test_who_waits_is_not_failed_by_a_step_of_others(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = running.verifier(llm, max_sequences=1)
    whole, failed = Transformer.forward, list[bool]()

    def fails_once(*args: Any) -> torch.Tensor:
        if not failed and verifier.metric("waiting_sequences") == 1:
            failed.append(True)
            raise MemoryError("out of memory")
        return whole(*args)

    monkeypatch.setattr(Transformer, "forward", fails_once)
    with channel(verifier.address, INSECURE) as connection:
        first = Begun(connection, request(PROMPT, 250))
        first.admitted()
        second = Begun(connection, request(PROMPT, 8))
        with pytest.raises(SequenceFailed, match="out of memory"):
            list(first.outputs())
        tokens = [token for output in second.outputs() for token in output.token_ids]
    assert tokens == hugging_face_greedy(llm, PROMPT, 8)
    prompts = 2 * (len(PROMPT) - 1)  # the last token of each is the root of the first tree
    assert verifier.metric("prompt_tokens_total") == prompts


def test_behind_an_error_of_the_device_another_verifier_can_go_on(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that failed whatever it is given would be the least loaded of all."""
    verifier = running.verifier(llm)
    monkeypatch.setattr(Transformer, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("illegal access")))
    monkeypatch.setattr(Runner, "device_works", lambda _: False)
    for _ in range(2):
        with pytest.raises(SequenceFailed) as caught:
            verifier.generate(PROMPT, 8)
        assert caught.value.reason == verifier_pb2.FAILURE_REASON_STOPPING


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the engine's thread ends with it
def test_an_error_between_steps_leaves_nobody_waiting(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_down(monkeypatch)
    verifier = running.verifier(llm)
    with channel(verifier.address, INSECURE) as connection:
        outputs = Begun(connection, request(PROMPT, 200)).outputs()
        next(outputs)
        monkeypatch.setattr(Engine, "_admit", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory left")))
        second = Begun(connection, request(PROMPT, 8))
        with pytest.raises(SequenceFailed) as caught:
            list(outputs)
        second.cancel()
    assert caught.value.reason == verifier_pb2.FAILURE_REASON_STOPPING


def _slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a request does not end before something else does."""
    whole = Transformer.forward

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(0.02)
        return whole(*args)

    monkeypatch.setattr(Transformer, "forward", slow)


def test_a_stopping_verifier_lets_another_go_on(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow_down(monkeypatch)
    with services() as started:
        verifier = started.verifier(llm, drain_timeout_s=0.0)
        with channel(verifier.address, INSECURE) as connection:
            outputs = Begun(connection, request(PROMPT, 250)).outputs()
            next(outputs)
            started.close()
            with pytest.raises(SequenceFailed) as caught:
                list(outputs)
    assert caught.value.reason == verifier_pb2.FAILURE_REASON_STOPPING


# What a speculator may answer instead of a draft, by name.
Answer = Callable[[speculator_pb2.SpeculateRequest], speculator_pb2.SpeculateResponse]


def _draft(message: speculator_pb2.SpeculateRequest, **tree: Any) -> speculator_pb2.SpeculateResponse:
    drafts = [
        speculator_pb2.Draft(sequence_id=order.sequence_id, trees=[tree_pb2.TokenTree(**tree)])
        for order in message.draft
    ]
    return speculator_pb2.SpeculateResponse(step=message.step, drafts=drafts)


def _hang(message: speculator_pb2.SpeculateRequest) -> speculator_pb2.SpeculateResponse:
    time.sleep(1.5)
    return speculator_pb2.SpeculateResponse(step=message.step)


GARBAGE: dict[str, tuple[str, Answer]] = {
    "hang": ("late", _hang),
    "cycle": ("invalid", lambda m: _draft(m, token_ids=[3, 4, 5], parents=[-1, 2, 1])),
    "sizes": ("invalid", lambda m: _draft(m, token_ids=[3, 4, 5], parents=[-1, 0])),
    "empty": ("invalid", lambda m: _draft(m)),
    "vocabulary": ("invalid", lambda m: _draft(m, token_ids=[3, VOCAB], parents=[-1, 0])),
    "another root": ("invalid", lambda m: _draft(m, token_ids=[299, 4], parents=[-1, 0])),
    "over budget": ("invalid", lambda m: _draft(m, token_ids=range(100), parents=range(-1, 99))),
    "distributions": (
        "invalid",
        lambda m: _draft(m, token_ids=[3], parents=[-1], sampled_nodes=[0], distributions=b"x"),
    ),
    "future step": ("invalid", lambda m: speculator_pb2.SpeculateResponse(step=m.step + 7)),
    "another sequence": (
        "invalid",
        lambda m: speculator_pb2.SpeculateResponse(step=m.step, drafts=[speculator_pb2.Draft(sequence_id=10**6)]),
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

    def answer(message: speculator_pb2.SpeculateRequest) -> speculator_pb2.SpeculateResponse:
        if message.draft and slow.pop() if slow else False:
            time.sleep(0.3)  # a long prompt
        return speculator_pb2.SpeculateResponse(step=message.step)

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
        _wait(lambda: verifier.metric("speculator_up", speculator=address) == 1)


def test_a_speculator_that_forgot_everything_is_told_again(llm: Path, running: Services) -> None:
    def forget(message: speculator_pb2.SpeculateRequest) -> speculator_pb2.SpeculateResponse:
        unknown = [order.sequence_id for order in message.draft]
        return speculator_pb2.SpeculateResponse(step=message.step, unknown_sequence_ids=unknown)

    recorder = Recorder(forget)
    with scripted_speculator(llm, recorder) as address:
        verifier = running.verifier(llm, address)
        verifier.generate(PROMPT, 5)
        # The step for the last token drafts nothing: at most one token is left.
        assert len(recorder.opened) == 4
        assert len(set(recorder.opened)) == 1
        assert verifier.metric("speculator_up", speculator=address) == 1


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "family 'gpt2' is not supported",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "only safetensors load"),
        (lambda folder: _truncate(folder / "model.safetensors"), "damaged or truncated"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_a_broken_model_folder_stops_the_start(
    damage: Callable[[Path], None], complaint: str, tmp_path: Path, running: Services
) -> None:
    folder = write_model(tmp_path / "llm")
    damage(folder)
    for start in (running.verifier, running.speculator):
        with pytest.raises(Exception, match=complaint) as caught:
            start(folder)
        assert "\n" not in str(caught.value)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_an_ssm_with_another_tokenizer_stops_the_start(llm: Path, tmp_path: Path, running: Services) -> None:
    stranger = write_model(tmp_path / "stranger", tokenizer_seed="zebra")
    with pytest.raises(StartupError, match=r"SSM stranger has a vocabulary of \d+ and tokenizer \w+, but LLM"):
        running.verifier(llm, running.speculator(stranger))
    with pytest.raises(StartupError, match="SSM stranger"):
        running.speculator(llm, stranger)


class Recorder:
    """What a scripted speculator has seen, and what it answers: nothing, if not told otherwise."""

    def __init__(self, answer: Answer = lambda message: speculator_pb2.SpeculateResponse(step=message.step)) -> None:
        self.answer = answer
        self.opened: list[int] = []
        self.closed: list[int] = []


@contextmanager
def scripted_speculator(llm: Path, recorder: Recorder) -> Iterator[str]:
    """A real gRPC server that fits the LLM and whose drafts are scripted; yields its address."""
    facts = tree_pb2.ModelInfo(model="scripted", vocab_size=VOCAB, tokenizer_hash=tokenizer_hash(llm))

    class Scripted(SpeculatorServicer):
        def ListModels(self, request: tree_pb2.ModelInfoRequest, context: Any) -> speculator_pb2.DraftModels:
            return speculator_pb2.DraftModels(models=[facts])

        def Speculate(
            self, request_iterator: Iterator[speculator_pb2.SpeculateRequest], context: Any
        ) -> Iterator[speculator_pb2.SpeculateResponse]:
            for message in request_iterator:
                recorder.opened.extend(opened.sequence_id for opened in message.open)
                recorder.closed.extend(message.close)
                yield recorder.answer(message)

    server = grpc.server(ThreadPoolExecutor(4))
    add_SpeculatorServicer_to_server(Scripted(), server)
    port = server.add_insecure_port(f"127.0.0.1:{free_port()}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(1).wait(TIMEOUT_S)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


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


def test_a_budget_that_cannot_learn_costs_no_request(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def learn(*_arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(WholeDrafts, "learn", learn)
    verifier = running.verifier(llm)
    expected = hugging_face_greedy(llm, PROMPT, 6)
    assert [verifier.generate(PROMPT, 6).token_ids for _ in range(2)] == [expected] * 2
    assert "nothing was learned from a step" in caplog.text
