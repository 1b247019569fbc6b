"""Settings of the verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.common.settings import ServiceSettings, SettingsError, setting
from speculation.acceptance import AcceptanceRule

# The largest trees, unless draft_nodes says otherwise; each step drafts what pays.
CPU_DRAFT_NODES, GPU_DRAFT_NODES = 15, 31


@dataclass(frozen=True, kw_only=True)
class VerifierSettings(ServiceSettings):
    """The large language model: checks token trees and generates."""

    host: str = setting("Address to listen on.", default="127.0.0.1")
    port: int = setting("Port to listen on; 0 chooses a free one.", default=50051, minimum=0, maximum=65535)
    health_port: int = setting(
        "Port of a second listener without TLS that answers health checks and nothing else, for probes that have no "
        "certificate; 0: none.",
        default=0,
        minimum=0,
        maximum=65535,
    )
    llm: str = setting("Folder or hub id of the large language model.")
    model_name: str = setting("Name to serve it under; empty for the folder's name or the hub id.", default="")
    speculator: tuple[str, ...] = setting("HOST:PORT of a speculator; repeatable.", default=())
    tls_server_name: str = setting(
        "Name that the speculators' certificates must carry; empty: the host of their address.", default=""
    )
    speculator_wait_s: float = setting(
        "How long the start waits for each speculator; later it is tried again in the background.",
        default=20.0,
        minimum=0,
    )
    device: str = setting("auto, cpu, cuda, cuda:1, ...", default="auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = setting(
        "Type of the weights; auto: as stored. int8 is rounding: another model, half the memory of bfloat16.",
        default="auto",
    )
    tensor_parallel: int = setting("Ranks that share each layer, a device each.", default=1, minimum=1)
    pipeline_parallel: int = setting("Stages of consecutive layers.", default=1, minimum=1)
    rank_timeout_s: float = setting(
        "A rank that is silent, or computes without reaching the others, for so long ends the group.",
        default=30.0,
        minimum=1,
    )
    kernels: Literal["auto", "native", "triton", "torch"] = setting("Kernels to run.", default="auto")
    threads: int = setting(
        "CPU threads of the model, for each rank; 0: all cores, shared by the ranks of a machine.", default=0, minimum=0
    )
    kv_memory: float = setting("Fraction of the free memory for the KV cache.", default=0.5, minimum=0.01, maximum=0.95)
    kv_blocks: int = setting(
        "Blocks of 16 tokens of the KV cache; 0: as many as kv_memory holds.", default=0, minimum=0
    )
    max_sequences: int = setting("Sequences in one step.", default=32, minimum=1)
    max_waiting: int = setting("Sequences that may wait; more get RESOURCE_EXHAUSTED.", default=256, minimum=1)
    max_step_rows: int = setting("Rows of one step, prompt chunks and trees together.", default=512, minimum=2)
    prefill_chunk: int = setting("Prompt tokens of one sequence in one step.", default=256, minimum=1)
    acceptance: AcceptanceRule = setting(
        "How sampled requests accept drafts: shared-noise (a seed fixes the text), mss or naive.",
        default=AcceptanceRule.SHARED_NOISE,
    )
    draft_nodes: int | None = setting(
        f"Most draft tokens of a tree; 0 switches drafting off. More pay where a step costs little more for many rows: "
        f"without this setting {CPU_DRAFT_NODES} on a CPU and {GPU_DRAFT_NODES} on a GPU.",
        default=None,
        minimum=0,
        maximum=255,
    )
    draft_depth: int = setting("Most levels of a tree.", default=8, minimum=1, maximum=64)
    draft_width: tuple[int, ...] = setting(
        "Children of a node at each depth, for static trees, which are drafted whole at every step; repeatable. Empty: "
        "best-first growth.",
        default=(),
    )
    draft_always: bool = setting(
        "Draft the whole tree at every step, whether it pays or not: for measurements. Else each step drafts what pays "
        "for itself, by measured times and acceptance, down to nothing.",
        default=False,
    )
    step_times: str = setting(
        "Folder that keeps the measured step times of this model on this machine, and what was learned about drafting; "
        "empty: specserve in the user's cache folder; none: measure at every start, keep nothing.",
        default="",
    )
    draft_timeout_ms: int = setting("How long a step waits for its drafts.", default=500, minimum=1)

    def most_draft_nodes(self, device_type: str) -> int:
        """On a device of this type, as torch names it."""
        if self.draft_nodes is not None:
            return self.draft_nodes
        return CPU_DRAFT_NODES if device_type == "cpu" else GPU_DRAFT_NODES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.acceptance is AcceptanceRule.GREEDY:
            raise SettingsError("acceptance is greedy; that rule is for requests of temperature 0, which always get it")
        if any(width < 1 for width in self.draft_width):
            raise SettingsError(f"draft_width is {list(self.draft_width)}; each depth needs at least 1 child")
