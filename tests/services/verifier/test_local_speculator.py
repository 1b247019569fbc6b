"""A speculator inside of the verifier: the text of plain decoding, in fewer steps, also when drafting fails."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.common.drafting import SpeculateRequest, SpeculateResponse
from services.common.lifecycle import StartupError
from services.speculator.hosting import HostedSpeculator
from services.speculator.loading import LoadedSpeculator
from services.speculator.settings import SpeculatorSettings
from services.verifier import local_speculator
from services.verifier.engine import Engine
from services.verifier.runner import Runner
from speculation.tree import TokenTree
from tests.services.harness import Host, Services
from tests.services.verifier.test_lossless import assert_lossless, prompts
from tests.tiny_models import write_model

PROMPT = [7, 30, 22, 9, 151]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "repetition_penalty": 1.3, "seed": 6},
    {"temperature": 0.7, "top_k": 20, "seed": 7},
]


def host_of(*ssms: Path, kind: type[HostedSpeculator] = HostedSpeculator) -> Host:
    settings = SpeculatorSettings(ssm=tuple(map(str, ssms)), kv_memory=0.01, insecure=True)

    def host(registry: CollectorRegistry) -> HostedSpeculator:
        loaded = LoadedSpeculator.load(settings, registry)
        return kind(loaded.service, loaded.facts)

    return host


def test_greedy_text_is_that_of_plain_decoding(llm: Path, ssms: list[Path], running: Services) -> None:
    verifier = running.verifier(llm, host=host_of(*ssms[:2]))
    assert_lossless(verifier, llm, prompts(6), at_once=3)
    assert verifier.metric("accepted_tokens_total") > 0
    assert verifier.metric("accepted_from_total", source=ssms[1].name) > 0
    assert verifier.metric("answer_seconds_count", speculator="local") > 0


def test_a_step_is_settled_while_the_next_one_is_computed(
    llm: Path, ssms: list[Path], running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a device computes behind `forward`; with one request, so that no step but the first settles nothing."""
    order: list[str] = []
    settle = Engine._settle

    def settled(engine: Engine) -> None:
        order.extend("settle" for _ in engine._unsettled)
        settle(engine)

    def noted(owner: type, name: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            result = inner(*arguments)
            order.append(name)
            return result

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(Runner, "asynchronous", True)
    monkeypatch.setattr(Engine, "_settle", settled)
    noted(Runner, "forward")
    noted(Engine, "_verify")
    verifier = running.verifier(llm, host=host_of(ssms[0]))
    assert_lossless(verifier, llm, prompts(1), at_once=1)
    steps = order.count("forward")
    assert steps > 2
    assert order == ["forward", "_verify", *["forward", "settle", "_verify"] * (steps - 1), "settle"]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_seed_fixes_the_text(sampling: dict[str, Any], llm: Path, ssms: list[Path], running: Services) -> None:
    drafted, plain = running.verifier(llm, host=host_of(ssms[0])), running.verifier(llm)
    results = [verifier.generate(PROMPT, 24, sampling=sampling) for verifier in (drafted, plain)]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].llm_steps < results[1].llm_steps


def test_it_drafts_beside_a_remote_one(llm: Path, ssms: list[Path], running: Services) -> None:
    verifier = running.verifier(llm, running.speculator(ssms[0]), host=host_of(ssms[1]))
    assert_lossless(verifier, llm, prompts(4))
    assert all(verifier.metric("accepted_from_total", source=ssm.name) > 0 for ssm in ssms[:2])


def test_a_budget_learns_from_it(llm: Path, ssms: list[Path], running: Services) -> None:
    verifier = running.verifier(llm, host=host_of(ssms[0]), draft_always=False)
    assert_lossless(verifier, llm, prompts(4))
    assert verifier.metric("draft_tokens_total") > 0


class Failing(HostedSpeculator):
    """Fails at each answer while `broken` is set."""

    broken = False

    def answer(self, message: SpeculateRequest) -> SpeculateResponse:
        if Failing.broken:
            raise RuntimeError("no more drafts")
        return super().answer(message)


class Wild(HostedSpeculator):
    """Drafts tokens that no vocabulary has."""

    def answer(self, message: SpeculateRequest) -> SpeculateResponse:
        response = super().answer(message)
        wild = {key: [_with_last_token(tree, 1 << 20) for tree in trees] for key, trees in response.drafts.items()}
        return replace(response, drafts=wild)


def _with_last_token(tree: TokenTree, token_id: int) -> TokenTree:
    return replace(tree, token_ids=(*tree.token_ids[:-1], token_id))


def test_its_failures_cost_no_token(
    llm: Path, ssms: list[Path], running: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_speculator, "REST_S", 0.2)
    monkeypatch.setattr(Failing, "broken", False)
    verifier = running.verifier(llm, host=host_of(ssms[0], kind=Failing))
    whole = verifier.generate(PROMPT, 24)
    assert whole.llm_steps < 24
    monkeypatch.setattr(Failing, "broken", True)
    assert verifier.generate(PROMPT, 24).token_ids == whole.token_ids
    assert verifier.metric("speculator_failures_total", speculator="local", reason="failed") > 0
    monkeypatch.setattr(Failing, "broken", False)
    time.sleep(0.2)
    again = verifier.generate(PROMPT, 24)
    assert again.token_ids == whole.token_ids
    assert again.llm_steps < 24, "it drafts again"


def test_a_draft_that_breaks_the_rules_costs_no_token(llm: Path, ssms: list[Path], running: Services) -> None:
    verifier = running.verifier(llm, host=host_of(ssms[0], kind=Wild))
    assert_lossless(verifier, llm, prompts(2))
    assert verifier.metric("speculator_failures_total", speculator="local", reason="failed") == 1, "then it rests"


def test_a_small_model_of_other_tokens_is_refused(llm: Path, tmp_path: Path, running: Services) -> None:
    other = write_model(tmp_path / "other", "llama-gqa", tokenizer_seed="other")
    with pytest.raises(StartupError, match="use one with the LLM's tokenizer"):
        running.verifier(llm, host=host_of(other))
