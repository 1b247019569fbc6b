"""What bad requests, full queues, leaving clients and failing steps do: an error, never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from protos import verifier_pb2
from runtime.transformer import Transformer
from services.common.grpc_setup import channel
from services.common.lifecycle import StartupError
from services.common.tls import INSECURE
from services.verifier.budget import WholeDrafts
from services.verifier.drafts import DraftCollector
from services.verifier.engine import Engine
from services.verifier.runner import Runner
from tests.services.harness import Begun, SequenceFailed, Services, Verifier, request, services
from tests.services.verifier.scripted_speculator import Recorder, scripted_speculator, wait_until
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
            wait_until(lambda: verifier.metric("requests_total", outcome="cancelled") == 1)
        wait_until(lambda: recorder.closed == recorder.opened != [])  # told once the last step is counted
        steps = verifier.metric("sequence_steps_total")
        time.sleep(0.05)
        assert verifier.metric("sequence_steps_total") == steps < 200, "no step is spent on it any more"
        verifier.generate(PROMPT, 3)
        assert verifier.metric("kv_free_blocks") >= free


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
    whole = Transformer.step
    monkeypatch.setattr(Transformer, "step", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(SequenceFailed, match="out of memory") as caught:
        verifier.generate(PROMPT, 8)
    assert caught.value.reason == verifier_pb2.FAILURE_REASON_INTERNAL
    monkeypatch.setattr(Transformer, "step", whole)
    assert verifier.generate(PROMPT, 8).token_ids == hugging_face_greedy(llm, PROMPT, 8)


def test_who_waits_is_not_failed_by_a_step_of_others(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = running.verifier(llm, max_sequences=1)
    whole, failed = Transformer.step, list[bool]()

    def fails_once(*args: Any) -> torch.Tensor:
        if not failed and verifier.metric("waiting_sequences") == 1:
            failed.append(True)
            raise MemoryError("out of memory")
        return whole(*args)

    monkeypatch.setattr(Transformer, "step", fails_once)
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
    monkeypatch.setattr(Transformer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("illegal access")))
    monkeypatch.setattr(Runner, "device_works", lambda _: False)
    for _ in range(2):
        with pytest.raises(SequenceFailed) as caught:
            verifier.generate(PROMPT, 8)
        assert caught.value.reason == verifier_pb2.FAILURE_REASON_STOPPING


def test_who_has_just_ended_when_the_device_fails_hears_of_it(
    llm: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its last step gave was still to be handed out."""
    verifier = running.verifier(llm)
    whole = DraftCollector.ask

    def fails_behind_the_first_end(collector: DraftCollector, plans: Any) -> Any:
        if verifier.metric("requests_total", outcome="length"):
            raise RuntimeError("illegal access")
        return whole(collector, plans)

    monkeypatch.setattr(DraftCollector, "ask", fails_behind_the_first_end)
    monkeypatch.setattr(Runner, "device_works", lambda _: False)
    with channel(verifier.address, INSECURE) as connection:
        going_on = Begun(connection, request(PROMPT, 250))
        going_on.admitted()
        for ending in (Begun(connection, request(PROMPT, 8)), going_on):
            with pytest.raises(SequenceFailed) as caught:
                list(ending.outputs())
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
    whole = Transformer.step

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(0.02)
        return whole(*args)

    monkeypatch.setattr(Transformer, "step", slow)


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
