"""Settings of the speculator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.common.settings import ServiceSettings, SettingsError, setting

CPU_BEAM, GPU_BEAM = 2, 4


@dataclass(frozen=True, kw_only=True)
class SpeculatorSettings(ServiceSettings):
    """Small models and look-up in texts: draft token trees for a verifier."""

    host: str = setting("Address to listen on.", default="127.0.0.1")
    port: int = setting("Port to listen on; 0 chooses a free one.", default=50052, minimum=0, maximum=65535)
    health_port: int = setting(
        "Port of a second listener without TLS that answers health checks and nothing else, for probes that have no "
        "certificate; 0: none.",
        default=0,
        minimum=0,
        maximum=65535,
    )
    ssm: tuple[str, ...] = setting(
        "Folder or hub id of a small model; repeatable, all with the LLM's tokenizer. Without, look-up drafts alone.",
        default=(),
    )
    prompt_lookup: bool = setting(
        "Draft what followed where the end of a sequence stood before in its own prompt or output. It costs next to no "
        "time and pays where text is repeated: summaries, edits, code, extraction.",
        default=True,
    )
    suffix_index_tokens: int = setting(
        "Draft what followed where the end of a sequence stood in earlier outputs, of any request; keep so many tokens "
        "of them, the newest, at about 250 bytes each. 0: off. Others' outputs only ever make a text come faster, "
        "which its reader could notice; they never change it.",
        default=200_000,
        minimum=0,
    )
    device: str = setting("auto, cpu, cuda, cuda:1, ...", default="auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = setting(
        "Type of the weights; auto: as stored. int8 is rounding: another model, half the memory of bfloat16.",
        default="auto",
    )
    kernels: Literal["auto", "native", "triton", "torch"] = setting("Kernels to run.", default="auto")
    threads: int = setting(
        "CPU threads of the models; 0: all cores. They sleep between drafts; a second one shortens drafts of several "
        "sequences where a core is free meanwhile.",
        default=1,
        minimum=0,
    )
    kv_memory: float = setting(
        "Fraction of the free memory for the KV caches.", default=0.2, minimum=0.01, maximum=0.95
    )
    max_sequences: int = setting(
        "Sequences whose KV each model keeps; older ones are computed again.", default=64, minimum=1
    )
    prefill_chunk: int = setting("Prompt tokens in one forward pass: drafts wait for one.", default=512, minimum=1)
    beam: int | None = setting(
        f"Nodes that best-first growth expands at each depth; without this setting {CPU_BEAM} on a CPU and {GPU_BEAM} "
        "on a GPU.",
        default=None,
        minimum=1,
        maximum=64,
    )
    min_confidence: float = setting(
        "Paths less probable than this are not drafted any deeper, and by look-up not at all.",
        default=0.02,
        minimum=0,
        maximum=1,
    )

    def beam_on(self, device_type: str) -> int:
        """On a device of this type, as torch names it."""
        if self.beam is not None:
            return self.beam
        return CPU_BEAM if device_type == "cpu" else GPU_BEAM

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ssm or self.prompt_lookup or self.suffix_index_tokens):
            raise SettingsError(
                "nothing to draft with: give --ssm, or switch on prompt_lookup or suffix_index_tokens; to work without "
                "drafts start no speculator (`specserve up --no-speculator`)"
            )
