"""The gateway before a verifier of scripted tokens: real processes, real gRPC and HTTP, no model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.client import Stream
from benchmarks.gateway import WORD, added_seconds, measure_gateway
from tests.tiny_models import write_model


def test_an_event_is_compared_with_the_last_token_that_it_brought() -> None:
    events = [{"choices": [{"text": text}]} for text in (WORD, "", 2 * WORD)] + [{"choices": []}]
    stream = Stream(started=100.0, times=[0.25, 0.3, 0.75, 0.8], events=events, total_s=0.8)
    assert list(added_seconds(stream, [100.0, 100.2, 100.5])) == pytest.approx([0.25, 0.25])


def test_every_token_of_every_stream_comes_through_and_is_timed(tmp_path: Path) -> None:
    load = asyncio.run(measure_gateway(str(write_model(tmp_path / "tiny")), streams=6, tokens=5, interval_ms=40))
    assert (load.streams, load.failed) == (6, 0)
    assert 6 <= load.events <= 30
    assert 0 < load.added_ms_p50 <= load.added_ms_p99


@pytest.mark.slow
def test_five_hundred_open_streams_all_end_well(tmp_path: Path) -> None:
    # All are open before the first ends: 500 requests 10 ms apart, 20 tokens a second apart.
    load = asyncio.run(measure_gateway(str(write_model(tmp_path / "tiny")), streams=500, tokens=20, interval_ms=1000))
    assert (load.streams, load.failed) == (500, 0)
