"""What a loaded model is called."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from runtime.transformer import LoadOptions, Transformer
from services.common.loaded_model import LoadedModel
from tests.tiny_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-1")


def name_of(folder_or_id: str, name: str = "") -> str:
    load = partial(Transformer.load, options=LoadOptions(device="cpu", kernels="torch"))
    return LoadedModel.load(folder_or_id, load, kv_memory=0.01, max_sequences=1, name=name).facts.model


def test_a_folder_is_served_under_its_own_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    assert name_of(str(folder)) == name_of(f"{folder}/") == name_of(".") == name_of("../tiny-1") == "tiny-1"
    assert name_of(str(tmp_path / "link")) == "link"
    assert name_of(".", name="given") == "given"


def test_a_model_of_the_hub_is_served_under_its_whole_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, allow_patterns: str(folder))
    assert name_of("somebody/Model-8B") == "somebody/Model-8B"
    assert name_of("somebody/Model-8B", name="given") == "given"
