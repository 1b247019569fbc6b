"""A speculator over gRPC: what it reads from its models' folders at start."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import speculator_pb2
from protos.speculator_pb2_grpc import SpeculatorStub
from services.common.draft_wire import request_to_wire, response_from_wire
from services.common.drafting import DraftRequest, OpenSequence, SpeculateRequest
from services.common.grpc_setup import channel
from services.common.lifecycle import StartupError
from services.common.tls import INSECURE
from services.speculator.drafter import Drafter
from speculation.calibration import CALIBRATION_FILE, Calibration
from speculation.children import ChildSelection
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree
from tests.services.harness import Services, services
from tests.tiny_models import VOCAB, write_model

PROMPT = [7, 30, 22, 9, 151]
GREEDY = SamplingParams(temperature=0)
TIMEOUT_S = 30


@pytest.fixture
def running() -> Iterator[Services]:
    with services() as started:
        yield started


def draft(address: str, nodes: int) -> Sequence[TokenTree]:
    """The greedy trees of one node's children behind PROMPT, one of each model."""
    message = opening(1, 1, PROMPT)
    message.draft.MergeFrom(request_to_wire(SpeculateRequest(draft=[DraftRequest(1, nodes, 1, (nodes,))])).draft)
    with channel(address, INSECURE) as connection:
        response = next(SpeculatorStub(connection).Speculate(iter([message]), timeout=TIMEOUT_S))
    return response_from_wire(response, VOCAB).drafts[1]


def test_every_model_has_the_calibration_of_its_folder(tmp_path: Path, running: Services) -> None:
    temperatures = {"plain": 1.0, "sharp": 0.5, "soft": 4.0}
    folders = [write_model(tmp_path / name) for name in temperatures]
    for folder in folders[1:]:
        Calibration(greedy_temperature=temperatures[folder.name]).write(folder, {})
    trees = draft(running.speculator(*folders), 5)
    assert [tree.source for tree in trees] == list(temperatures)
    plain = trees[0].confidences
    for tree in trees:
        assert tree.token_ids == trees[0].token_ids
        # c(x) - c(y) = (log q(x) - log q(y)) / temperature
        differences = [(c - tree.confidences[1]) * temperatures[tree.source] for c in tree.confidences[2:]]
        assert differences == pytest.approx([c - plain[1] for c in plain[2:]], abs=1e-4)
    assert trees[1].confidences[1] > plain[1] > trees[2].confidences[1]


def test_sampled_trees_leave_out_what_would_not_fit_a_message(
    tmp_path: Path, running: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.speculator.server.DISTRIBUTION_BYTES", 2 * 5 * 4 * VOCAB)  # 5 nodes of each model
    address = running.speculator(write_model(tmp_path / "one"), write_model(tmp_path / "other"))
    sampled, top = ChildSelection.SAMPLED, ChildSelection.TOP
    request = SpeculateRequest(1)
    for sequence_id, selection in {1: sampled, 2: top, 3: sampled, 4: sampled, 5: top}.items():
        params = SamplingParams(seed=sequence_id) if selection is sampled else GREEDY
        request.open.append(OpenSequence(sequence_id, PROMPT, params, len(PROMPT)))
        request.draft.append(DraftRequest(sequence_id, 3, 3, (1, 1, 1), selection))
    message = request_to_wire(request)
    with caplog.at_level(logging.WARNING), channel(address, INSECURE) as connection:
        responses = list(SpeculatorStub(connection).Speculate(iter([message] * 2), timeout=TIMEOUT_S))
    for response in responses:
        drafts = response_from_wire(response, VOCAB).drafts
        assert {sequence_id: [len(tree) - 1 for tree in trees] for sequence_id, trees in drafts.items()} == {
            1: [3, 3],
            2: [3, 3],
            3: [2, 2],
            5: [3, 3],
        }
        assert len(response.trees.distributions) == 2 * 5 * 4 * VOCAB
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        "sampled trees made smaller or left out; their distributions exceed a message"
    ], "once for the stream"


def opening(step: int, sequence_id: int, tokens: list[int]) -> speculator_pb2.SpeculateRequest:
    return request_to_wire(SpeculateRequest(step, open=[OpenSequence(sequence_id, tokens, GREEDY, len(tokens))]))


def asking(message: speculator_pb2.SpeculateRequest, *sequence_ids: int) -> speculator_pb2.SpeculateRequest:
    asked = SpeculateRequest(draft=[DraftRequest(sequence_id, 4, 2) for sequence_id in sequence_ids])
    message.draft.MergeFrom(request_to_wire(asked).draft)
    return message


def drafted(response: speculator_pb2.SpeculateResponse) -> dict[int, tuple[int, ...]]:
    drafts = response_from_wire(response, VOCAB).drafts
    return {sequence_id: trees[0].token_ids for sequence_id, trees in drafts.items()}


def test_messages_are_answered_while_a_long_text_is_computed(
    tmp_path: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.speculator.server._PAUSE_S", 0.04)  # before each of 99 pieces
    folder, long = write_model(tmp_path / "ssm"), PROMPT * 20
    address = running.speculator(folder, prefill_chunk=1, prompt_lookup=False)
    with channel(address, INSECURE) as connection:

        def messages() -> Iterator[speculator_pb2.SpeculateRequest]:
            yield opening(1, 1, long)
            yield asking(opening(2, 2, PROMPT), 1, 2)
            for step in range(3, 1000):
                time.sleep(0.05)
                yield asking(speculator_pb2.SpeculateRequest(step=step), 1)

        responses = SpeculatorStub(connection).Speculate(messages(), timeout=TIMEOUT_S)
        assert drafted(next(responses)) == {}
        health: Any = health_pb2_grpc.HealthStub(connection)  # its type stub lacks the calls
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert drafted(next(responses)).keys() == {2}
        late = next(found for response in responses if (found := drafted(response)))
        responses.cancel()
    with channel(running.speculator(folder, prompt_lookup=False), INSECURE) as connection:
        alone = next(SpeculatorStub(connection).Speculate(iter([asking(opening(1, 1, long), 1)]), timeout=TIMEOUT_S))
    assert late == drafted(alone)


def test_what_fails_between_messages_fails_the_stream_that_finds_it(
    tmp_path: Path, running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = running.speculator(write_model(tmp_path / "ssm"), prompt_lookup=False)
    failing = threading.Event()

    def fail(_: Drafter) -> bool:
        failing.set()
        raise MemoryError("no room for activations")

    with channel(address, INSECURE) as connection:

        def messages() -> Iterator[speculator_pb2.SpeculateRequest]:
            yield opening(1, 1, PROMPT)
            assert failing.wait(TIMEOUT_S)
            for step in range(2, 1000):  # the failure is found behind an answer
                yield asking(speculator_pb2.SpeculateRequest(step=step), 1)

        with monkeypatch.context() as patch:
            patch.setattr(Drafter, "work_ahead", fail)
            with pytest.raises(grpc.RpcError, match="INTERNAL"):
                list(SpeculatorStub(connection).Speculate(messages(), timeout=TIMEOUT_S))
        again = next(SpeculatorStub(connection).Speculate(iter([asking(opening(1, 1, PROMPT), 1)]), timeout=TIMEOUT_S))
    assert drafted(again).keys() == {1}


def test_a_broken_calibration_stops_the_start(tmp_path: Path, running: Services) -> None:
    folder = write_model(tmp_path / "ssm")
    (folder / CALIBRATION_FILE).write_text('{"disagreement": "much"}')
    with pytest.raises(StartupError, match=r"ssm/speculation\.json: disagreement is 'much'; it must be a number"):
        running.speculator(folder)
