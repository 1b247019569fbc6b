"""python -m services.verifier --llm FOLDER [--speculator HOST:PORT ...] [--tensor-parallel N] [--pipeline-parallel N]

Started by torchrun, each process is one rank of the group.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path

from runtime.parallel.place import BadPlace, Place
from services.common.command_line import run_command
from services.common.logs import configure_logs
from services.verifier.settings import VerifierSettings


def run(settings: VerifierSettings, config: Path | None) -> int:
    """Run as the whole verifier, as rank 0 of a group, or as another rank; returns the exit code."""
    try:
        place = Place.of_environment(os.environ)
    except BadPlace as error:
        print(f"verifier: {error}", file=sys.stderr)
        return 1
    if place is not None and place.rank > 0:
        from services.verifier.worker import run_rank  # the other ranks need no gRPC

        code = run_rank(settings, place)
    else:
        from services.common.service import serve_until_signal
        from services.verifier.server import serve

        configure_logs("verifier", settings.log_level, settings.log_format)
        code = serve_until_signal("verifier", settings, partial(serve, place=place))
    if settings.tensor_parallel * settings.pipeline_parallel > 1:
        logging.shutdown()
        # Threads may wait for a rank that is gone: the engine's would hold the process, the collectives' abort it.
        os._exit(code)
    return code


if __name__ == "__main__":
    run_command(VerifierSettings, "verifier", run)
