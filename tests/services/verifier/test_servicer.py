"""Sequences that share a stream: each has what it would have alone, and what ends one of them ends no other."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import verifier_pb2
from protos.verifier_pb2_grpc import VerifierStub
from services.common.grpc_setup import channel
from services.common.tls import INSECURE
from services.verifier import wire
from services.verifier.request import FinishReason, QueueFull, SequenceEvent, StepOutput, TokenLogprob
from tests.services.harness import Services, Verifier, request, services
from tests.tiny_models import VOCAB

PROMPTS = [[5, 17, 60, 3], [9, 9, 2], [40, 41, 42, 43, 44], [7]]
TIMEOUT_S = 60


class Stream:
    """A Generate call that stays open until `half_close`."""

    def __init__(self, connection: grpc.Channel) -> None:
        self._messages: queue.SimpleQueue[verifier_pb2.GenerateRequest | None] = queue.SimpleQueue()
        messages = iter(self._messages.get, None)
        self.call: Any = VerifierStub(connection).Generate(messages, timeout=TIMEOUT_S)
        self.responses: list[verifier_pb2.GenerateResponse] = []

    def begin(self, sequence_id: int, prompt: list[int], new_tokens: int, **options: Any) -> None:
        self.send(begin=[sequence(sequence_id, prompt, new_tokens, **options)])

    def send(self, **fields: Any) -> None:
        self._messages.put(verifier_pb2.GenerateRequest(**fields))

    def half_close(self) -> None:
        self._messages.put(None)

    def next(self) -> verifier_pb2.GenerateResponse:
        response: verifier_pb2.GenerateResponse = next(self.call)
        self.responses.append(response)
        return response

    def read_until(self, sequence_id: int, *, last: bool = False) -> None:
        """Up to an output of the sequence, or its last."""
        while not any(
            output.sequence_id == sequence_id and (output.finish_reason or not last) for output in self.next().outputs
        ):
            pass

    def read_all(self) -> None:
        """Up to the end of the stream."""
        self.responses += list(self.call)

    def tokens(self, sequence_id: int) -> list[int]:
        outputs = [output for response in self.responses for output in response.outputs]
        return [token for output in outputs if output.sequence_id == sequence_id for token in output.token_ids]

    def failures(self) -> dict[int, verifier_pb2.SequenceFailure]:
        return {failure.sequence_id: failure for response in self.responses for failure in response.failures}


@contextmanager
def open_stream(verifier: Verifier) -> Iterator[Stream]:
    with channel(verifier.address, INSECURE) as connection:
        stream = Stream(connection)
        try:
            yield stream
        finally:
            stream.half_close()
            stream.call.cancel()


def sequence(sequence_id: int, prompt: list[int], new_tokens: int, **options: Any) -> verifier_pb2.BeginSequence:
    message = request(prompt, new_tokens, **options)
    message.sequence_id = sequence_id
    return message


def wait(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_each_has_what_it_has_alone(shared_verifier: Verifier) -> None:
    alone = [shared_verifier.generate(prompt, 24).token_ids for prompt in PROMPTS]
    with open_stream(shared_verifier) as stream:
        stream.send(begin=[sequence(i, prompt, 24) for i, prompt in enumerate(PROMPTS[:3], start=1)])
        stream.read_until(1)
        stream.begin(9, PROMPTS[3], 24)
        stream.half_close()
        stream.read_all()
    assert [stream.tokens(sequence_id) for sequence_id in (1, 2, 3, 9)] == alone
    assert not stream.failures()


def test_admission_comes_first_and_the_finish_reason_last(shared_verifier: Verifier) -> None:
    with open_stream(shared_verifier) as stream:
        stream.send(begin=[sequence(i, prompt, 12) for i, prompt in enumerate(PROMPTS, start=1)])
        stream.half_close()
        stream.read_all()
    for sequence_id in range(1, 5):
        events: list[object] = []
        for response in stream.responses:
            events += ["admitted"] * list(response.admitted).count(sequence_id)
            events += [output.finish_reason for output in response.outputs if output.sequence_id == sequence_id]
        assert events[0] == "admitted"
        assert events[-1] == verifier_pb2.FINISH_REASON_LENGTH
        assert not any(events[1:-1])


def test_what_a_step_gives_them_comes_together(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, max_sequences=16)
    with open_stream(verifier) as stream:
        stream.send(begin=[sequence(i, [i, 3, 7], 30) for i in range(1, 17)])
        stream.half_close()
        stream.read_all()
    outputs = sum(len(response.outputs) for response in stream.responses)
    assert outputs == 16 * 30
    # A message may leave in the middle of a step; hardly any step is sent one by one.
    assert len(stream.responses) < outputs / 4


def test_a_cancelled_one_is_freed_and_the_others_go_on(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, max_sequences=4)
    free, alone = verifier.metric("kv_free_blocks"), verifier.generate(PROMPTS[1], 60).token_ids
    with open_stream(verifier) as stream:
        stream.send(begin=[sequence(1, PROMPTS[0], 240), sequence(2, PROMPTS[1], 60)])
        stream.read_until(1)
        stream.send(cancel=[1, 77])  # of which the verifier never heard
        stream.read_until(2, last=True)
        wait(lambda: verifier.metric("requests_total", outcome="cancelled") == 1)
        stream.begin(3, PROMPTS[1], 60)
        stream.half_close()
        stream.read_all()
    assert stream.tokens(2) == stream.tokens(3) == alone
    assert len(stream.tokens(1)) < 240
    assert verifier.metric("kv_free_blocks") >= free


def test_a_stream_whose_last_sequence_is_cancelled_ends(shared_verifier: Verifier) -> None:
    with open_stream(shared_verifier) as stream:
        stream.begin(1, PROMPTS[0], 240)
        stream.read_until(1)
        stream.send(cancel=[1])
        stream.half_close()
        stream.read_all()
    assert len(stream.tokens(1)) < 240


def test_a_refused_one_hurts_no_other(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, max_sequences=1, max_waiting=1)
    with open_stream(verifier) as stream:
        stream.begin(1, PROMPTS[0], 100)
        stream.read_until(1)
        stream.send(begin=[sequence(2, [VOCAB], 4), sequence(3, PROMPTS[1], 4), sequence(4, PROMPTS[2], 4)])
        stream.half_close()
        stream.read_all()
    assert [len(stream.tokens(sequence_id)) for sequence_id in (1, 2, 3, 4)] == [100, 0, 4, 0]
    failures = stream.failures()
    assert {key: failure.reason for key, failure in failures.items()} == {
        2: verifier_pb2.FAILURE_REASON_INVALID,
        4: verifier_pb2.FAILURE_REASON_QUEUE_FULL,
    }
    assert failures[4].retry_after_ms >= 100


@pytest.mark.parametrize("second", [4, 3])
def test_ids_that_do_not_rise_end_the_stream_and_free_its_sequences(llm: Path, running: Services, second: int) -> None:
    verifier = running.verifier(llm)
    with open_stream(verifier) as stream:
        stream.begin(4, PROMPTS[0], 240)
        stream.read_until(4)
        stream.begin(second, PROMPTS[1], 4)
        with pytest.raises(grpc.RpcError) as caught:
            stream.read_all()
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"sequence id {second} behind 4" in str(caught.value.details())
    wait(lambda: verifier.metric("requests_total", outcome="cancelled") == 1)


def test_a_broken_stream_frees_all_of_its_sequences(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, max_sequences=2)
    with open_stream(verifier) as stream:
        stream.send(begin=[sequence(i, [i, 3], 240) for i in range(1, 5)])  # two of them wait
        stream.read_until(1)
    wait(lambda: verifier.metric("requests_total", outcome="cancelled") == 4)
    assert len(verifier.generate(PROMPTS[0], 4).token_ids) == 4


def test_a_drain_waits_for_sequences_and_not_for_streams(llm: Path) -> None:
    with services() as started:
        verifier = started.verifier(llm, drain_timeout_s=30.0)
        with open_stream(verifier) as idle, open_stream(verifier) as busy:
            idle.begin(1, PROMPTS[0], 2)
            idle.read_until(1, last=True)
            busy.begin(1, PROMPTS[1], 240)
            busy.read_until(1)
            began = time.monotonic()
            started.close()
            assert time.monotonic() - began < 20
            idle.read_all()
            busy.read_all()
    assert len(busy.tokens(1)) == 240
    assert not busy.failures()


def test_large_log_probabilities_take_messages_of_their_own() -> None:
    many = tuple(TokenLogprob(-1.0, (1, 2, 3), (-1.0, -2.0, -3.0)) for _ in range(50_000))
    events: Sequence[tuple[int, SequenceEvent]] = [
        (1, None),
        (2, None),
        (1, StepOutput((5,), 1, prompt_logprobs=many)),
        (2, StepOutput((6,), 1, prompt_logprobs=many)),
        (1, StepOutput((7,), 2, finish_reason=FinishReason.LENGTH)),
        (2, QueueFull(3, 500)),
    ]
    responses = list(wire.generate_responses(events))
    assert len(responses) == 3
    assert all(response.ByteSize() < 2 * 2**20 for response in responses)
    assert [[output.token_ids[0] for output in response.outputs] for response in responses] == [[5], [6], [7]]
    assert list(responses[0].admitted) == [1, 2]
    assert responses[2].failures[0].retry_after_ms == 500
    assert list(wire.generate_responses([])) == []
