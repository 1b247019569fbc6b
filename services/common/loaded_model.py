"""Loading a model into a service. The gateway, which computes no tensors, never imports this."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from kernels import native
from kernels.backend import REQUESTED, BackendUnavailable
from runtime.config import UnsupportedModel
from runtime.kv_cache import CacheFull, KVCache
from runtime.step_model import LoadedPart
from services.common.lifecycle import StartupError
from services.common.model_facts import ModelFacts
from services.common.model_files import resolve_model, served_name, tokenizer_hash

log = logging.getLogger(__name__)

M = TypeVar("M", bound=LoadedPart)


def use_threads(threads: int, processes: int = 1) -> None:
    """Set the CPU threads of torch and the native kernels, for this thread and those it starts.

    0: all cores, shared by so many processes.
    """
    count = threads or max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(count)
    if native.native_available():
        native.set_num_threads(count)


def leave_cores_to_kernels(model: LoadedPart) -> None:
    """Beside the native kernels give PyTorch one thread: what is left to it is small, and its threads spin after it."""
    if model.backend.name == "native":
        torch.set_num_threads(1)


@dataclass(frozen=True)
class LoadedModel(Generic[M]):
    """A model, the folder it came from, its KV cache, and what other services are told of it."""

    folder: Path
    model: M
    cache: KVCache
    facts: ModelFacts

    @classmethod
    def load(
        cls,
        folder_or_id: str,
        load: Callable[[Path], M],
        kv_memory: float,
        max_sequences: int,
        kv_blocks: int = 0,
        name: str = "",
    ) -> LoadedModel[M]:
        """Load a folder or hub id; the cache takes `kv_memory` of the free memory, at most what max_sequences can use.

        load: makes the model from its folder.
        kv_blocks: size of the cache in blocks instead; 0 for the above.
        name: what it is served as; empty for the folder's name or the hub id.

        Raises:
            StartupError: one line that says why the model cannot be served.
        """
        try:
            folder = resolve_model(folder_or_id)
            model = load(folder)
            cache = model.new_cache(kv_memory, max_sequences, kv_blocks)
        except (UnsupportedModel, BackendUnavailable, CacheFull) as error:
            raise StartupError(str(error)) from None
        leave_cores_to_kernels(model)
        facts = _facts(name or served_name(folder_or_id), model, tokenizer_hash(folder))
        log.info("model loaded", extra={**vars(facts), "because": model.backend.reason, "kv_blocks": cache.blocks})
        if model.backend.name == "torch" and model.backend.reason != REQUESTED:
            log.warning("no kernels of our own run: text comes slowly", extra={"because": model.backend.reason})
        return cls(folder, model, cache, facts)

    def capture(self, prepare: Callable[[], int]) -> None:
        """Have CUDA graphs captured before anybody waits for them. prepare: captures, and says how many shapes."""
        started = time.perf_counter()
        if self.model.device.type == "cuda":
            log.info("capturing CUDA graphs; with new kernels this takes a minute", extra={"model": self.facts.model})
        if shapes := prepare():
            taken = round(time.perf_counter() - started, 1)
            log.info("CUDA graphs captured", extra={"model": self.facts.model, "shapes": shapes, "s": taken})


def _facts(name: str, model: LoadedPart, tokenizer: str) -> ModelFacts:
    return ModelFacts(
        model=name,
        vocab_size=model.config.vocab_size,
        context_length=model.config.context_length,
        tokenizer_hash=tokenizer,
        eos_token_ids=model.config.eos_token_ids,
        device=str(model.device),
        dtype=str(model.weight_dtype).removeprefix("torch."),
        kernels=model.backend.name,
        parameters=model.config.parameters,
    )
