"""TLS between a verifier and its speculator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.services.harness import Services

CASES = ("known", "verifier without", "speculator without", "verifier of others", "speculator of others")
PATIENCE_S = 30.0


@pytest.mark.parametrize("case", CASES)
def test_a_speculator_drafts_for_verifiers_with_the_right_certificate_alone(
    case: str, llm: Path, ssms: list[Path], running: Services, tmp_path: Path
) -> None:
    ours, others = Authority(), Authority()
    plain: dict[str, Any] = {}
    server = others if case == "speculator of others" else ours
    theirs = plain if case == "speculator without" else plain | server.files(tmp_path / "speculator", trusted=ours)
    address = running.speculator(ssms[0], **theirs)
    signer = others if case == "verifier of others" else ours
    mine = plain if case == "verifier without" else signer.files(tmp_path / "verifier", trusted=ours)
    known = case == "known"
    verifier = running.verifier(llm, address, speculator_wait_s=60 if known else 1, **mine)
    assert verifier.metric("speculator_up", speculator=address) == known


def test_renewed_certificates_reach_the_speculator_without_a_restart(
    llm: Path, ssms: list[Path], running: Services, tmp_path: Path
) -> None:
    ours, others = Authority(), Authority()
    theirs: dict[str, Any] = {**ours.files(tmp_path / "speculator")}
    address = running.speculator(ssms[0], **theirs)
    mine: dict[str, Any] = {**others.files(tmp_path / "verifier", trusted=ours)}
    verifier = running.verifier(llm, address, speculator_wait_s=1, **mine)
    assert not verifier.metric("speculator_up", speculator=address)
    ours.files(tmp_path / "verifier")
    deadline = time.monotonic() + PATIENCE_S
    while not verifier.metric("speculator_up", speculator=address):
        assert time.monotonic() < deadline
        time.sleep(0.1)
