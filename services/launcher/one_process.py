"""python -m services.launcher.one_process VERIFIER-FLAGS -- SPECULATOR-FLAGS

A verifier that hosts its speculator: on one machine each step is spared the way to another process and back. Messages
stay those of the wire, so that neither service knows the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.common.command_line import run_command
from services.common.logs import configure_logs
from services.common.service import serve_until_signal
from services.launcher.settings import SEPARATOR
from services.speculator.hosting import HostedSpeculator
from services.speculator.loading import LoadedSpeculator
from services.speculator.settings import SpeculatorSettings
from services.verifier.server import serve
from services.verifier.settings import VerifierSettings


def main(arguments: Sequence[str]) -> None:
    """Run both until a signal; exits the process."""
    split = list(arguments).index(SEPARATOR) if SEPARATOR in arguments else len(arguments)
    own, speculators = arguments[:split], arguments[split + 1 :]

    def with_speculator(drafting: SpeculatorSettings, config: Path | None) -> int:
        run_command(VerifierSettings, "verifier", partial(_run, drafting), own)

    run_command(SpeculatorSettings, "speculator", with_speculator, speculators)


def _run(drafting: SpeculatorSettings, settings: VerifierSettings, config: Path | None) -> int:
    configure_logs("verifier", settings.log_level, settings.log_format)

    def host(registry: CollectorRegistry) -> HostedSpeculator:
        loaded = LoadedSpeculator.load(drafting, registry)
        return HostedSpeculator(loaded.service, loaded.facts)

    return serve_until_signal("verifier", settings, partial(serve, host=host))


if __name__ == "__main__":
    main(sys.argv[1:])
