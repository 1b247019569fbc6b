from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from services.common.logs import configure_logs, request_id

log = logging.getLogger("services.example")


@pytest.fixture(autouse=True)
def restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_json_lines_carry_fields_and_the_request_id() -> None:
    stream = io.StringIO()
    configure_logs("verifier", "info", "json", stream)
    with request_id("cmpl-1"):
        log.info("finished %s", "well", extra={"tokens": 3, "level": "no field may hide a standard one"})
    log.debug("too quiet")
    log.info("outside")
    inside, outside = (json.loads(line) for line in stream.getvalue().splitlines())
    assert inside["event"] == "finished well"
    assert (inside["level"], inside["service"], inside["logger"]) == ("info", "verifier", "services.example")
    assert (inside["tokens"], inside["request_id"]) == (3, "cmpl-1")
    assert inside["time"].endswith("Z")
    assert "request_id" not in outside


def test_json_lines_stay_one_line_with_a_traceback() -> None:
    stream = io.StringIO()
    configure_logs("verifier", "info", "json", stream)
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        log.exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ZeroDivisionError: a bug" in json.loads(line)["exception"]


def test_console_lines_quote_what_would_be_ambiguous() -> None:
    stream = io.StringIO()
    configure_logs("gateway", "warning", "console", stream)
    log.info("hidden")
    log.warning("slow", extra={"ms": 12, "text": "two words", "empty": ""})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('WARNING gateway: slow ms=12 text="two words" empty=""')


def test_the_last_configuration_wins() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logs("gateway", "info", "console", first)
    configure_logs("gateway", "info", "console", second)
    log.info("once")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1
