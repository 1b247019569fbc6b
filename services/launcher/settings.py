"""What `specserve up` and `specserve complete` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.common.settings import setting

MODELS = Path(__file__).resolve().parents[2] / "models"
EMBEDDED_LLM = str(MODELS / "default-llm")
EMBEDDED_SSMS = (str(MODELS / "default-ssm-1"), str(MODELS / "default-ssm-2"))
# Between the flags of a verifier and those of the speculator inside of it.
SEPARATOR = "--"


def embedded_ssms(llm: str) -> tuple[str, ...]:
    """The small models that come with a large one, in the order in which they were tuned."""
    return EMBEDDED_SSMS if llm == EMBEDDED_LLM else ()


@dataclass(frozen=True, kw_only=True)
class UpSettings:
    """Starts Redis, verifier with speculator, and gateway here, until Ctrl-C.

    Other settings of the services come from their own tables of the --config file, or from the environment.
    """

    llm: str = setting("Large model: a folder or a hub id.", default=EMBEDDED_LLM)
    ssm: tuple[str, ...] = setting(
        "Small model that drafts for it: a folder or a hub id; repeatable. The embedded LLM has two, and only the "
        "first drafts: on a CPU the other costs more than it brings. Another LLM without one has its drafts looked "
        "up in the prompt and in earlier outputs.",
        default=(),
    )
    speculator: bool = setting(
        "Draft with small models and by look-up; without, the large model works alone.", default=True
    )
    speculator_process: bool = setting(
        "Run the speculator as a process of its own, as on a cluster, where it can fail and be watched alone. Without, "
        "it drafts inside of the verifier, among whose metrics its own then are, and each step is spared the way there "
        "and back.",
        default=False,
    )
    speculator_per_ssm: bool = setting(
        "Run a speculator process for each small model, so that they draft at the same time where cores are free. The "
        "first one also looks drafts up, and alone has the --speculator-port and serves metrics.",
        default=False,
    )
    host: str = setting("Address that the HTTP API listens on.", default="127.0.0.1")
    port: int = setting("Port of the HTTP API; 0 chooses a free one.", default=8000, minimum=0, maximum=65535)
    verifier_port: int = setting("Port of the verifier; 0 chooses a free one.", default=0, minimum=0, maximum=65535)
    speculator_port: int = setting(
        "Port of the speculator, where it is a process of its own; 0 chooses a free one.",
        default=0,
        minimum=0,
        maximum=65535,
    )
    redis_url: str | None = setting("A Redis server that runs already; without, one is started.", default=None)
    tensor_parallel: int = setting("Processes that share each layer of the large model.", default=1, minimum=1)
    pipeline_parallel: int = setting(
        "Stages of consecutive layers of the large model, in processes of their own.", default=1, minimum=1
    )
    threads: int = setting(
        "CPU threads of the large model, and of small ones inside of its process; 0: all cores.", default=0, minimum=0
    )
    start_timeout_s: float = setting("Seconds that a service may take to start.", default=300.0, minimum=1)
    drain_timeout_s: float = setting(
        "Seconds that open requests may take to end after Ctrl-C.", default=30.0, minimum=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("Least severe lines to log.", default="info")
    log_format: Literal["console", "json"] = setting("Log lines for people or for machines.", default="console")

    @property
    def drafting(self) -> tuple[str, ...]:
        """The small models that draft: those given, else the first embedded one where it fits, else none.

        With none, a speculator drafts by look-up.
        """
        if not self.speculator:
            return ()
        return self.ssm or embedded_ssms(self.llm)[:1]

    @property
    def one_process(self) -> bool:
        """Whether the speculator drafts inside of the verifier; one of several processes has none inside."""
        apart = self.speculator_process or self.speculator_per_ssm or self.speculator_port > 0
        return self.speculator and not apart and self.tensor_parallel * self.pipeline_parallel == 1

    @property
    def speculators(self) -> tuple[tuple[str, ...], ...]:
        """The small models of each speculator process."""
        if not self.speculator or self.one_process:
            return ()
        if self.speculator_per_ssm and self.drafting:
            return tuple((ssm,) for ssm in self.drafting)
        return (self.drafting,)
