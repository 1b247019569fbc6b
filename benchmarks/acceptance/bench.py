"""The models of a run, loaded once in each process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from benchmarks.acceptance.lines import BOOSTED, INDEPENDENT, source_names
from runtime.transformer import LoadOptions, Transformer
from services.common.loaded_model import LoadedModel, use_threads
from services.common.model_facts import ModelFacts
from services.gateway.tokenizer import GatewayTokenizer
from services.speculator.drafter import Drafter
from services.speculator.session import DrafterSettings
from speculation.calibration import Calibration

LLM_MEMORY, SSM_MEMORY = 0.25, 0.1
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Setup:
    """Everything that figures depend on but the prompts.

    boosted, independent: folders or hub ids of the SSMs of each set. sequences: how many are decoded at once.
    beam: nodes that best-first growth expands at each depth. threads: of each process; 0 for all cores.
    """

    llm: str
    boosted: tuple[str, ...]
    independent: tuple[str, ...] = ()
    new_tokens: int = 128
    seed: int = 0
    sequences: int = 16
    beam: int = 4
    device: str = "cpu"
    threads: int = 0

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """Names of the SSMs by set, without empty sets."""
        sizes = {BOOSTED: len(self.boosted), INDEPENDENT: len(self.independent)}
        return {name: source_names(name, size) for name, size in sizes.items() if size}


@dataclass(frozen=True, eq=False)
class Bench:
    """Loaded models. models: the SSMs by the names that lines use. facts: the LLM's first, then the SSMs' by name."""

    llm: LoadedModel[Transformer]
    tokenizer: GatewayTokenizer
    models: Mapping[str, Drafter]
    facts: Mapping[str, ModelFacts]

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that every model can take."""
        return min(facts.context_length for facts in self.facts.values())


@lru_cache(maxsize=1)
def load(setup: Setup) -> Bench:
    """The models of a run.

    Raises:
        ModelFilesError, StartupError: a model is missing or cannot be loaded. ModelMismatch: an SSM has other tokens.
    """
    use_threads(setup.threads)
    transformer = partial(Transformer.load, options=LoadOptions(device=setup.device))
    llm = LoadedModel.load(setup.llm, transformer, LLM_MEMORY, setup.sequences)
    facts = {"llm": llm.facts}
    models: dict[str, Drafter] = {}
    names = [name for of in setup.sets.values() for name in of]
    for name, folder in zip(names, (*setup.boosted, *setup.independent), strict=True):
        ssm = LoadedModel.load(folder, transformer, SSM_MEMORY, setup.sequences)
        ssm.facts.check_drafts_for(llm.facts)
        facts[name] = ssm.facts
        # A floor of 0: every tree has as many nodes as it may have.
        calibration = Calibration.read(ssm.folder)
        settings = DrafterSettings(PREFILL_CHUNK, setup.beam, 0.0, stream=1 + len(models), calibration=calibration)
        models[name] = Drafter(name, ssm.model, ssm.cache, settings)
    return Bench(llm, GatewayTokenizer.from_folder(llm.folder), models, facts)
