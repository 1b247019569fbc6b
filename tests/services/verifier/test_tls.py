"""TLS between a verifier and its speculator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.services.harness import Services


@pytest.mark.parametrize("case", ["known", "verifier without", "speculator without", "verifier of others"])
def test_a_speculator_drafts_for_verifiers_with_the_right_certificate_alone(
    case: str, llm: Path, ssms: list[Path], running: Services, tmp_path: Path
) -> None:
    ours, others = Authority(), Authority()
    plain: dict[str, Any] = {}
    theirs = plain if case == "speculator without" else plain | ours.files(tmp_path / "speculator")
    address = running.speculator(ssms[0], **theirs)
    signer = others if case == "verifier of others" else ours
    mine = plain if case == "verifier without" else signer.files(tmp_path / "verifier", trusted=ours)
    known = case == "known"
    verifier = running.verifier(llm, address, speculator_wait_s=60 if known else 1, **mine)
    assert verifier.metric("speculator_up", speculator=address) == known
