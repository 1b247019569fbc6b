"""Makes what drafts: small models with their calibrations, and look-ups."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from prometheus_client import CollectorRegistry

from runtime.transformer import LoadOptions, Transformer
from services.common.lifecycle import StartupError
from services.common.loaded_model import LoadedModel
from services.common.model_facts import ModelFacts, ModelMismatch
from services.speculator.draft_service import DraftService
from services.speculator.drafter import Drafter
from services.speculator.lookup import OutputLookup, PromptLookup
from services.speculator.metrics import SpeculatorMetrics
from services.speculator.session import DrafterSettings
from services.speculator.settings import SpeculatorSettings
from services.speculator.sources import DraftSource
from speculation.calibration import Calibration, InvalidCalibration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedSpeculator:
    """facts: of the small models."""

    service: DraftService
    facts: Sequence[ModelFacts]
    metrics: SpeculatorMetrics

    @classmethod
    def load(cls, settings: SpeculatorSettings, registry: CollectorRegistry) -> LoadedSpeculator:
        """Raises StartupError: a model cannot be served, or differs from the first in its tokens."""
        loaded = _load(settings)
        metrics = SpeculatorMetrics(registry)
        vocab_size = loaded[0].facts.vocab_size if loaded else None
        models = [_drafter(settings, model) for model in loaded]
        service = DraftService(models, _lookups(settings, metrics), vocab_size, metrics)
        return cls(service, [model.facts for model in loaded], metrics)


def _load(settings: SpeculatorSettings) -> list[LoadedModel[Transformer]]:
    """Load every model; StartupError when one cannot be served or differs from the first in its tokens."""
    load = partial(Transformer.load, options=LoadOptions(settings.device, settings.dtype, settings.kernels))
    share = settings.kv_memory / max(1, len(settings.ssm))
    loaded = [LoadedModel.load(ssm, load, share, settings.max_sequences) for ssm in settings.ssm]
    for model in loaded:
        try:
            model.facts.check_drafts_for(loaded[0].facts)
        except ModelMismatch as error:
            raise StartupError(str(error)) from None
    return loaded


def _lookups(settings: SpeculatorSettings, metrics: SpeculatorMetrics) -> list[DraftSource]:
    lookups: list[DraftSource] = []
    if settings.prompt_lookup:
        lookups.append(PromptLookup(settings.min_confidence))
    if settings.suffix_index_tokens:
        outputs = OutputLookup(settings.min_confidence, settings.suffix_index_tokens)
        metrics.suffix_index_tokens.set_function(lambda: len(outputs.index))
        lookups.append(outputs)
    return lookups


def _drafter(settings: SpeculatorSettings, loaded: LoadedModel[Transformer]) -> Drafter:
    """StartupError when the model's calibration is broken."""
    try:
        calibration = Calibration.read(loaded.folder)
    except InvalidCalibration as error:
        raise StartupError(str(error)) from None
    log.info("draft calibrated", extra={"model": loaded.facts.model, **asdict(calibration)})
    drafting = DrafterSettings(
        prefill_chunk=settings.prefill_chunk,
        beam=settings.beam_on(loaded.model.device.type),
        min_confidence=settings.min_confidence,
        stream=secrets.randbits(63),
        calibration=calibration,
    )
    drafter = Drafter(loaded.facts.model, loaded.model, loaded.cache, drafting, loaded.model.capture)
    loaded.capture(lambda: drafter.capture_drafts(settings.max_sequences))
    return drafter
