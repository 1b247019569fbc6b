"""Every combination of draft sources, with a model and without: the same text, and each source takes part in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import tree_pb2
from protos.speculator_pb2_grpc import SpeculatorStub
from services.common.draft_wire import request_to_wire
from services.common.drafting import AdvanceSequence, DraftRequest, SpeculateRequest
from services.common.grpc_setup import channel
from services.common.model_facts import TOKENIZER_METADATA
from services.common.settings import SettingsError
from services.common.tls import INSECURE
from speculation.acceptance import AcceptanceRule
from tests.services.harness import Begun, Services, Verifier, request, services, status_of
from tests.tiny_models import VOCAB, hugging_face_texts, write_model

NEW_TOKENS = 24
PROMPTS = [[7, 30, 22, 9, 151], [3], [11, 12, 13, 11, 12, 13, 11, 12], [200, 5]]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "repetition_penalty": 1.3, "seed": 6},
    {"temperature": 0.7, "top_k": 20, "seed": 7},
    *({"temperature": 1.0, "logit_bias": {11: 60.0, 12: 60.0}, "seed": seed} for seed in (8, 9)),  # repeat themselves
]
LOOKUPS: dict[str, dict[str, Any]] = {
    "prompt-lookup": {"suffix_index_tokens": 0},
    "suffix-index": {"prompt_lookup": False},
}
NO_LOOKUPS: dict[str, Any] = {"prompt_lookup": False, "suffix_index_tokens": 0}
SOURCES = ("ssm-0", "ssm-1", *LOOKUPS)
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(SOURCES, size)]
EXPANSIONS = [{"draft_nodes": 12}, {"draft_width": (3, 2, 1, 1), "draft_nodes": 24}]


@pytest.fixture(scope="module")
def speculators(llm: Path, ssms: list[Path]) -> Iterator[dict[str, str]]:
    """A speculator for each source, by its name."""
    with services() as started:
        addresses = {ssm.name: started.speculator(ssm, **NO_LOOKUPS) for ssm in ssms[:2]}
        yield addresses | {name: started.speculator(**settings) for name, settings in LOOKUPS.items()}


@pytest.fixture(scope="module")
def expected(llm: Path, shared_verifier: Verifier) -> list[list[int]]:
    """Greedy texts by Hugging Face, then sampled ones without drafts."""
    greedy = hugging_face_texts(llm, PROMPTS, NEW_TOKENS)
    return greedy + [shared_verifier.generate(PROMPTS[0], NEW_TOKENS, sampling=each).token_ids for each in SAMPLINGS]


def generate(verifier: Verifier) -> list[list[int]]:
    """The texts of all requests, several at once."""
    wanted = [(prompt, None) for prompt in PROMPTS] + [(PROMPTS[0], sampling) for sampling in SAMPLINGS]
    with ThreadPoolExecutor(4) as pool:
        texts = pool.map(
            lambda each: verifier.generate(each[0], NEW_TOKENS, sampling=each[1], stop_token_ids=[0]).token_ids, wanted
        )
        return list(texts)


def accepted_from(verifier: Verifier, source: str) -> float:
    return verifier.metric("accepted_from_total", source=source)


@pytest.mark.parametrize("expansion", EXPANSIONS, ids=("best-first", "static"))
@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
def test_the_text_does_not_depend_on_the_sources(
    sources: tuple[str, ...],
    expansion: dict[str, Any],
    llm: Path,
    speculators: dict[str, str],
    expected: list[list[int]],
    running: Services,
) -> None:
    verifier = running.verifier(llm, *(speculators[source] for source in sources), **expansion)
    assert generate(verifier) == expected
    assert generate(verifier) == expected, "again, with the first ones' outputs in the index"
    contributed = {source: accepted_from(verifier, source) > 0 for source in SOURCES}
    assert contributed == {source: source in sources for source in SOURCES}
    assert verifier.metric("output_tokens_total") > verifier.metric("sequence_steps_total")


def test_all_sources_of_one_speculator(
    llm: Path, ssms: list[Path], expected: list[list[int]], running: Services
) -> None:
    verifier = running.verifier(llm, running.speculator(*ssms[:2]), draft_nodes=16)
    assert generate(verifier) == expected
    assert generate(verifier) == expected
    assert all(accepted_from(verifier, source) > 0 for source in SOURCES)


def test_a_repeated_request_is_found_in_the_suffix_index(llm: Path, running: Services) -> None:
    """Also its last tokens, and across streams; a request that its client left counts too."""
    speculator = running.speculator(**LOOKUPS["suffix-index"])
    first, other = (running.verifier(llm, speculator, draft_depth=16, draft_nodes=16) for _ in range(2))
    text = first.generate(PROMPTS[0], 40)
    assert (text.llm_steps, accepted_from(first, "suffix-index")) == (40, 0)
    repeated = other.generate(PROMPTS[0], 40)
    assert repeated.token_ids == text.token_ids
    assert repeated.llm_steps <= 8
    assert first.generate(PROMPTS[0], 40).llm_steps <= 8
    short = first.generate(PROMPTS[1], 3)
    assert first.generate(PROMPTS[1], 3).llm_steps < short.llm_steps


def test_a_speculator_without_models_announces_none_and_drafts(llm: Path, running: Services) -> None:
    address = running.speculator()
    with channel(address, INSECURE) as connection:
        assert not SpeculatorStub(connection).ListModels(tree_pb2.ModelInfoRequest(), timeout=30).models
    verifier = running.verifier(llm, address, acceptance=AcceptanceRule.MSS)
    assert verifier.metric("speculator_up", speculator=address) == 1
    for seed in range(3):
        verifier.generate(PROMPTS[2], NEW_TOKENS)
        assert len(verifier.generate(PROMPTS[2], NEW_TOKENS, sampling={"temperature": 1.0, "seed": seed}).token_ids) > 0
    assert verifier.metric("accepted_tokens_total") > 0
    assert verifier.metric("speculator_failures_total", speculator=address, reason="invalid") == 0


def test_a_speculator_with_nothing_to_draft_with_does_not_start(running: Services) -> None:
    with pytest.raises(SettingsError, match="nothing to draft with: give --ssm, or switch on prompt_lookup"):
        running.speculator(**NO_LOOKUPS)


def test_look_up_is_refused_to_a_verifier_of_another_tokenizer(llm: Path, tmp_path: Path, running: Services) -> None:
    """Its tokens would mean something else, or nothing, to the other one."""
    address = running.speculator()
    verifier = running.verifier(llm, address)
    stranger = running.verifier(write_model(tmp_path / "stranger", tokenizer_seed="zebra"), address)
    stranger.generate(PROMPTS[2], NEW_TOKENS)
    verifier.generate(PROMPTS[2], NEW_TOKENS)
    assert stranger.metric("drafts_total") == 0
    assert verifier.metric("drafts_total") > 0
    with channel(address, INSECURE) as connection:
        call = SpeculatorStub(connection).Speculate(iter([]), metadata=((TOKENIZER_METADATA, f"{VOCAB}:beef"),))
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    code, details = status_of(caught.value)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"the verifier has {VOCAB}:beef" in details


def test_a_client_that_leaves_closes_its_sessions_and_hurts_nobody(
    llm: Path, ssms: list[Path], expected: list[list[int]], running: Services
) -> None:
    verifier = running.verifier(llm, running.speculator(ssms[0]))
    with channel(verifier.address, INSECURE) as connection:
        for _ in range(3):
            sequence = Begun(connection, request(PROMPTS[0], 200))
            next(sequence.outputs())
            sequence.cancel()
    assert generate(verifier) == expected
    assert verifier.metric("speculator_failures_total", reason="invalid") == 0


def test_an_unknown_sequence_is_no_sequence_of_any_source(running: Services) -> None:
    with channel(running.speculator(), INSECURE) as connection:
        request = SpeculateRequest(4, [AdvanceSequence(7, [1])], close=[8], draft=[DraftRequest(9, 4, 2)])
        (response,) = SpeculatorStub(connection).Speculate(iter([request_to_wire(request)]))
    assert list(response.unknown_sequence_ids) == [7, 9]
