"""Where peers are installed, and which of them are there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PEERS = Path(__file__).resolve().parents[2] / ".peers"
LLAMA_CPP, VLLM = "llama.cpp", "vLLM"
# The parts of llama.cpp that take part: its OpenAI server, and its benchmark of batched decoding.
LLAMA_PROGRAMS = ("llama-server", "llama-batched-bench")
INSTALL = "`make bench-peers` installs it"


@dataclass(frozen=True)
class Peers:
    """The folders of the installed peers and their versions, by name; absent: why the others are not there."""

    folders: dict[str, Path] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def find_peers(home: Path = PEERS) -> Peers:
    """What a finished installation left in `home`: a folder with a stamp, or the reason why there is none."""
    found = Peers()
    for name in (LLAMA_CPP, VLLM):
        stamp, reason = stamp_of(home, name), reason_of(home, name)
        if stamp.exists():
            found.folders[name] = home / name
            found.versions[name] = stamp.read_text(encoding="utf-8").strip()
        else:
            why = reason.read_text(encoding="utf-8").strip() if reason.exists() else "not installed"
            found.absent[name] = f"{why}; {INSTALL}"
    return found


def stamp_of(home: Path, name: str) -> Path:
    """The file that says that `name` is installed, and in which version."""
    return home / name / "installed"


def reason_of(home: Path, name: str) -> Path:
    """The file that says why the last installation of `name` failed."""
    return home / f"{name}.absent"
