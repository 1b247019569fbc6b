"""Where a model's files are, and the fingerprint of its tokenizer.

Knows nothing of weights: runtime/ reads those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
HUB_FILES = (*TOKENIZER_FILES, "*.safetensors")


class ModelFilesError(Exception):
    """A model that cannot be found or read; the message is one line for the operator."""


def resolve_model(name: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a model given as a folder or as a hub id, downloaded unless the hub's cache has it.

    files: patterns of what is downloaded; TOKENIZER_FILES where no weights are needed.

    Raises:
        ModelFilesError: there is no such folder, it has no config.json, or the hub does not have it or is out of reach.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelFilesError(f"model {name}: is a file; give the folder that holds config.json and *.safetensors")
        if name.startswith((".", "/", "~")) or HUB_ID.fullmatch(name) is None:
            raise ModelFilesError(f"model {name}: no such folder; give a folder with config.json or a hub id")
        folder = _download(name, files)
    if not (folder / "config.json").is_file():
        raise ModelFilesError(f"model {name}: {folder} has no config.json; give a folder saved by save_pretrained()")
    return folder.resolve()


def served_name(name: str) -> str:
    """What a model given as a folder or as a hub id is called: the folder's own name, or the whole id."""
    folder = Path(name).expanduser()
    # A link keeps its own name; "." and ".." have none.
    return Path(os.path.abspath(folder)).name if folder.is_dir() else name


def tokenizer_hash(folder: Path) -> str:
    """SHA-256, in hexadecimal, of what gives token ids their meaning: vocabulary, merges and added tokens.

    Two tokenizers with this hash in common give the same text to the same ids.

    Raises:
        ModelFilesError: tokenizer.json is missing or unreadable.
    """
    path = folder / "tokenizer.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        model = document["model"]
        vocabulary = model["vocab"]
    except FileNotFoundError:
        raise ModelFilesError(f"model {folder}: has no tokenizer.json; save a fast tokenizer into it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFilesError(f"model {folder}: cannot read tokenizer.json: {error!r}") from None
    # Merges are pairs, written as "a b" by older versions of the format.
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    added = sorted((token["id"], token["content"]) for token in document.get("added_tokens") or [])
    content = {"vocab": vocabulary, "merges": merges, "added_tokens": added}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _download(hub_id: str, files: Sequence[str]) -> Path:
    # Imported here because it takes half a second and a model in a folder does not need it.
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except RepositoryNotFoundError:
        raise ModelFilesError(
            f"model {hub_id}: no such folder, and the hub has no such model or does not let you read it"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelFilesError(
            f"model {hub_id}: no such folder, not in the hub's cache, and the hub is out of reach ({reason})"
        ) from None
