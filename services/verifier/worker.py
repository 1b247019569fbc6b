"""Every rank but 0: it has no port and no requests, and takes part in the steps that rank 0 leads."""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial

from runtime.parallel.liveness import GroupFailed
from runtime.parallel.model import RankModel, follow
from runtime.parallel.place import Place
from services.common.large_pages import use_large_pages
from services.common.lifecycle import StartupError
from services.common.loaded_model import LoadedModel, use_threads
from services.common.logs import configure_logs
from services.common.model_files import ModelFilesError
from services.verifier.ranks import check_place, end_process, environment_store, join, options_of
from services.verifier.settings import VerifierSettings

log = logging.getLogger(__name__)


def run_rank(settings: VerifierSettings, place: Place) -> int:
    """Live as long as rank 0; returns the exit code.

    A stop signal goes to all ranks of a machine, and rank 0 may have requests to drain, for which it needs the others.
    """
    configure_logs(f"verifier rank {place.rank}", settings.log_level, settings.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        _take_part(settings, place)
    except (StartupError, ModelFilesError, GroupFailed) as error:
        print(f"verifier rank {place.rank}: {error}", file=sys.stderr)
        return 1
    return 0


def _take_part(settings: VerifierSettings, place: Place) -> None:
    check_place(settings, place)
    use_threads(settings.threads, place.local_ranks)
    options = options_of(settings, place)
    with join(settings, place, environment_store(), end_process) as group:
        load = partial(RankModel.load, options=options, group=group)
        loaded = LoadedModel.load(
            settings.llm, load, settings.kv_memory, settings.max_sequences, settings.kv_blocks, settings.model_name
        )
        use_large_pages()
        follow(loaded.model, loaded.cache, group)
    log.info("stopped")
