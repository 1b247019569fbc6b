"""A speculator over gRPC: what it reads from its models' folders at start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2_grpc import SpeculatorStub
from services.common.grpc_setup import channel
from services.common.lifecycle import StartupError
from services.common.tls import INSECURE
from services.common.tree_wire import sampling_to_wire
from speculation.calibration import CALIBRATION_FILE, Calibration
from speculation.sampling import SamplingParams
from tests.services.harness import Services, services
from tests.tiny_models import write_model

PROMPT = [7, 30, 22, 9, 151]
TIMEOUT_S = 30


@pytest.fixture
def running() -> Iterator[Services]:
    with services() as started:
        yield started


def draft(address: str, nodes: int) -> list[tree_pb2.TokenTree]:
    """The greedy trees of one node's children behind PROMPT, one of each model."""
    message = speculator_pb2.SpeculateRequest(step=1)
    greedy = sampling_to_wire(SamplingParams(temperature=0))
    message.open.add(sequence_id=1, token_ids=PROMPT, prompt_length=len(PROMPT), sampling=greedy)
    message.draft.add(
        sequence_id=1, max_nodes=nodes, max_depth=1, widths=[nodes], selection=speculator_pb2.CHILD_SELECTION_TOP
    )
    with channel(address, INSECURE) as connection:
        response = next(SpeculatorStub(connection).Speculate(iter([message]), timeout=TIMEOUT_S))
    return list(response.drafts[0].trees)


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


def test_a_broken_calibration_stops_the_start(tmp_path: Path, running: Services) -> None:
    folder = write_model(tmp_path / "ssm")
    (folder / CALIBRATION_FILE).write_text('{"disagreement": "much"}')
    with pytest.raises(StartupError, match=r"ssm/speculation\.json: disagreement is 'much'; it must be a number"):
        running.speculator(folder)
