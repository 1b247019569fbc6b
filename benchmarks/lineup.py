"""Who takes part: our configurations, and the peers at the best settings that a trial finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.configurations import (
    BEST_FIRST,
    HF,
    HF_ASSISTED,
    HF_ASSISTED_BF16,
    HF_BF16,
    LOOKUP,
    PLAIN,
    Configuration,
    merged_trees,
    sequence_speculation,
    static_tree,
)
from benchmarks.peers.configurations import (
    LLAMA_EXACT,
    llama_candidates,
    llama_draft_candidates,
    vllm_configuration,
    vllm_draft_configuration,
)
from benchmarks.peers.home import LLAMA_CPP, VLLM, Peers
from benchmarks.servers import Models
from services.common.settings import SettingsError

ENGINES = ("specserve", "transformers", LLAMA_CPP, VLLM)


class Trials(Protocol):
    """What the choice needs of a benchmark."""

    @property
    def models(self) -> Models: ...

    async def fastest(self, candidates: Sequence[Configuration]) -> Configuration: ...


@dataclass(frozen=True)
class Lineup:
    """engines: of ENGINES. sequence_length, static_width: shapes of our drafts. trials: whether settings are tried.

    Raises:
        SettingsError: an unknown engine.
    """

    peers: Peers
    engines: tuple[str, ...]
    sequence_length: int
    static_width: tuple[int, ...]
    trials: bool
    absent: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.engines) - set(ENGINES)):
            raise SettingsError(f"--only {unknown[0]}: choose from {', '.join(ENGINES)}")
        self.absent.update({name: why for name, why in self.peers.absent.items() if name in self.engines})

    async def choose(self, trials: Trials, inflated: bool) -> list[Configuration]:
        """The rows of a target's table, in their order; those that need an SSM only where there is one."""
        ssms = len(trials.models.ssms)
        chosen = self._ours(ssms, inflated)
        if "transformers" in self.engines:
            chosen += await self._hugging_face(trials)
        if self._takes_part(LLAMA_CPP):
            chosen += await self._llama(trials)
        if self._takes_part(VLLM):
            chosen += [vllm_configuration(), vllm_draft_configuration()]
        return [c for c in chosen if ssms or not c.drafts or c.engine == "specserve"]

    def takes_many(self, configuration: Configuration) -> bool:
        """Whether the row is also measured with several streams: plain and default of each server."""
        return configuration.key in (PLAIN.key, LOOKUP.key, "llama.cpp", "llama.cpp-draft", "vllm", "vllm-draft")

    def has_step_times(self, configuration: Configuration) -> bool:
        """Whether llama.cpp's own benchmark measures its steps."""
        return configuration.engine == LLAMA_CPP and not configuration.drafts

    def _takes_part(self, name: str) -> bool:
        return name in self.engines and name in self.peers.folders

    def _ours(self, ssms: int, inflated: bool) -> list[Configuration]:
        if "specserve" not in self.engines:
            return [PLAIN, LOOKUP]
        if inflated:
            return [PLAIN, BEST_FIRST, LOOKUP]
        shapes = [sequence_speculation(self.sequence_length), static_tree(self.static_width)]
        return [PLAIN, *shapes, BEST_FIRST, LOOKUP, *(merged_trees(ssms) if ssms > 1 else [])]

    async def _hugging_face(self, trials: Trials) -> list[Configuration]:
        """fp32, whose text is the reference, and bf16 where it is faster."""
        chosen = [HF, HF_ASSISTED]
        if self.trials and await trials.fastest([HF, HF_BF16]) is HF_BF16:
            chosen += [HF_BF16, HF_ASSISTED_BF16]
        return chosen

    async def _llama(self, trials: Trials) -> list[Configuration]:
        plain = llama_candidates()
        best = await trials.fastest(plain) if self.trials else plain[0]
        chosen = [LLAMA_EXACT, best]
        if trials.models.ssms:
            drafts = llama_draft_candidates(best)
            chosen.append(await trials.fastest(drafts) if self.trials else drafts[0])
        return chosen
