"""Who takes part depends on what is installed, on what was asked for, and on the trials."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.configurations import Configuration
from benchmarks.lineup import ENGINES, Lineup
from benchmarks.peers.home import LLAMA_CPP, VLLM, Peers
from benchmarks.servers import Models
from services.common.settings import SettingsError

ALL = Peers(folders={LLAMA_CPP: Path("l"), VLLM: Path("v")})
NONE = Peers(absent={LLAMA_CPP: "no compiler", VLLM: "not installed"})


@dataclass
class LastIsFastest:
    """Trials whose last candidate always wins."""

    ssms: int = 2
    tried: list[str] = field(default_factory=list)

    @property
    def models(self) -> Models:
        return Models("llm", ("ssm",) * self.ssms, "cpu", 0)

    async def fastest(self, candidates: Sequence[Configuration]) -> Configuration:
        self.tried += [candidate.title for candidate in candidates]
        return candidates[-1]


def lineup(peers: Peers, *engines: str, trials: bool = True) -> Lineup:
    return Lineup(peers, engines or ENGINES, 4, (2, 1), trials)


def keys(chosen: Lineup, trials: LastIsFastest, inflated: bool = False) -> list[str]:
    return [configuration.key for configuration in asyncio.run(chosen.choose(trials, inflated))]


def test_with_every_peer_each_has_plain_and_drafting_rows() -> None:
    trials = LastIsFastest()
    ours = ["plain", "sequence", "static-tree", "tree", "lookup", "merged", "merged-apart"]
    theirs = ["hf", "hf-assisted", "hf-bf16", "hf-assisted-bf16", "llama.cpp-fp32", "llama.cpp", "llama.cpp-draft"]
    assert keys(lineup(ALL), trials) == [*ours, *theirs, "vllm", "vllm-draft"]
    assert len(trials.tried) == len(set(trials.tried))
    assert keys(lineup(ALL), LastIsFastest(), inflated=True)[:4] == ["plain", "tree", "lookup", "hf"]


def test_the_fastest_precision_drafts_too() -> None:
    chosen = asyncio.run(lineup(ALL, LLAMA_CPP).choose(LastIsFastest(), inflated=False))
    by_key = {configuration.key: configuration for configuration in chosen}
    assert by_key["llama.cpp"].dtype == by_key["llama.cpp-draft"].dtype == "float16"
    assert by_key["llama.cpp-fp32"].dtype == "float32"


def test_absent_peers_take_no_part_and_are_named() -> None:
    chosen = lineup(NONE)
    assert {"llama.cpp", "vllm"}.isdisjoint(keys(chosen, LastIsFastest()))
    assert chosen.absent == {LLAMA_CPP: "no compiler", VLLM: "not installed"}


def test_a_peer_that_was_not_asked_for_is_not_called_absent() -> None:
    chosen = lineup(NONE, "specserve", VLLM)
    assert chosen.absent == {VLLM: "not installed"}
    assert keys(lineup(ALL, VLLM), LastIsFastest()) == ["plain", "lookup", "vllm", "vllm-draft"]


def test_without_an_ssm_peers_do_not_draft() -> None:
    assert keys(lineup(ALL, LLAMA_CPP, VLLM), LastIsFastest(ssms=0)) == [
        *("plain", "lookup", "llama.cpp-fp32", "llama.cpp", "vllm")
    ]


def test_without_trials_nothing_is_tried() -> None:
    trials = LastIsFastest()
    assert "llama.cpp-draft" in keys(lineup(ALL, trials=False), trials)
    assert trials.tried == []


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"--only other: choose from specserve, transformers, llama\.cpp, vLLM"):
        lineup(ALL, "other")
