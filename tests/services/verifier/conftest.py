"""A small LLM, relatives of it as SSMs, and services around them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from speculation.calibration import Calibration
from tests.services.harness import Services, Verifier, services
from tests.tiny_models import write_model, write_relative


@pytest.fixture
def running() -> Iterator[Services]:
    with services() as started:
        yield started


@pytest.fixture(scope="package")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llm", "llama-gqa")


@pytest.fixture(scope="package")
def shared_verifier(llm: Path) -> Iterator[Verifier]:
    """A verifier without speculators, for tests that leave it as it was."""
    with services() as started:
        yield started.verifier(llm)


@pytest.fixture(scope="package")
def ssms(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ssms")
    return [write_relative(folder / f"ssm-{seed}", llm, noise=0.06, seed=seed) for seed in range(3)]


@pytest.fixture(scope="package")
def calibrated_ssms(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two SSMs as good as each other, of which the second takes itself for much the better one."""
    folder = tmp_path_factory.mktemp("calibrated")
    paths = [write_relative(folder / f"calibrated-{seed}", llm, noise=0.06, seed=seed) for seed in range(2)]
    for path, calibration in zip(paths, (Calibration(3.0, 2.0), Calibration(0.5, 0.1)), strict=True):
        calibration.write(path, {})
    return paths
