from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.model_files import ModelFilesError, resolve_model, tokenizer_hash

TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 3, "content": "<end>", "special": True}, {"id": 4, "content": "<pad>", "special": True}],
}


def write(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_a_folder_resolves_to_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


def test_what_is_no_model_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    cases = {
        str(tmp_path / "nowhere"): "no such folder; give a folder with config.json or a hub id",
        "not a hub id": "no such folder",
        str(tmp_path / "model.safetensors"): "is a file; give the folder",
        str(tmp_path): "has no config.json",
    }
    for name, message in cases.items():
        with pytest.raises(ModelFilesError) as error:
            resolve_model(name)
        assert message in str(error.value)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_hub_that_is_out_of_reach_is_named(tmp_path: Path) -> None:
    # In a process of its own: huggingface_hub reads its environment when it is imported.
    program = "from services.common.model_files import resolve_model; resolve_model('nobody/nothing')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("services.common.model_files.ModelFilesError: model nobody/nothing: no such folder, not in")
    assert "out of reach" in last


def test_the_hash_depends_on_the_meaning_of_ids_alone(tmp_path: Path) -> None:
    reference = tokenizer_hash(write(tmp_path / "a", TOKENIZER))
    assert len(bytes.fromhex(reference)) == 32
    model = TOKENIZER["model"]
    same = {
        "version": "1.0",
        "added_tokens": list(reversed(TOKENIZER["added_tokens"])),
        "model": {"vocab": dict(reversed(model["vocab"].items())), "merges": ["a b"], "type": "BPE"},
    }
    assert tokenizer_hash(write(tmp_path / "same", same)) == reference
    different = [
        TOKENIZER | {"model": model | {"vocab": {"a": 1, "b": 0, "ab": 2}}},
        TOKENIZER | {"model": model | {"merges": []}},
        TOKENIZER | {"added_tokens": TOKENIZER["added_tokens"][:1]},
        TOKENIZER | {"added_tokens": [{"id": 3, "content": "<stop>"}, TOKENIZER["added_tokens"][1]]},
    ]
    hashes = {tokenizer_hash(write(tmp_path / "different", document)) for document in different}
    assert len(hashes) == 4
    assert reference not in hashes


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"has no tokenizer\.json"):
        tokenizer_hash(tmp_path)
    for content in ("{", "[]", "{}", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelFilesError, match=r"cannot read tokenizer\.json"):
            tokenizer_hash(tmp_path)
