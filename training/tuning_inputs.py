"""What tuning starts from: settings, models, prompts, and the check that a folder is not another run's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtime.config import ModelConfig, read_config
from services.common.model_files import resolve_model, tokenizer_hash
from services.common.prompt_files import read_prompts
from training.continuations import Job
from training.files import write_json

PREVIOUS = "previous"


class CannotTune(Exception):
    """Something that the user can put right; the message is one line."""


@dataclass(frozen=True)
class SsmStart:
    """Where a small model starts: from a trained one, new with `layers` of `width`, or as the one tuned before it."""

    model: str = ""
    layers: int = 0
    width: int = 0
    previous: bool = False

    @classmethod
    def from_model(cls, name: str) -> SsmStart:
        return cls(previous=True) if name == PREVIOUS else cls(model=name)

    @classmethod
    def parse(cls, size: str) -> SsmStart:
        """Raises CannotTune unless the size is LAYERSxWIDTH."""
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None or not (layers := int(match[1])) or (width := int(match[2])) % 16 or not width:
            raise CannotTune(f"--ssm-size: got {size!r}; give LAYERSxWIDTH, the width a multiple of 16, such as 2x192")
        return cls(layers=layers, width=width)

    def __str__(self) -> str:
        return PREVIOUS if self.previous else self.model or f"{self.layers}x{self.width}"


@dataclass(frozen=True)
class TuneSettings:
    """See the flags of `specserve tune`."""

    llm: str
    ssms: tuple[SsmStart, ...]
    prompts: Path
    out: Path
    continuations: Path
    boost: bool
    segment: int
    new_tokens: int
    samples: int
    tokens: int
    batch: int
    learning_rate: float
    threads: int
    seed: int


def check_starts(settings: TuneSettings, llm: Path, config: ModelConfig) -> list[SsmStart]:
    """The starts with hub ids resolved; CannotTune when there is none or one has other tokens than the LLM."""
    if not settings.ssms:
        raise CannotTune("no SSM to tune; give --ssm FOLDER or --ssm-size LAYERSxWIDTH, once for each")
    if settings.ssms[0].previous:
        raise CannotTune(f"--ssm {PREVIOUS}: there is none before the first SSM; give it a folder or a --ssm-size")
    expected = tokenizer_hash(llm)
    resolved = [SsmStart(str(resolve_model(start.model))) if start.model else start for start in settings.ssms]
    for model in (Path(start.model) for start in resolved if start.model):
        vocab, tokens = read_config(model).vocab_size, tokenizer_hash(model)
        if (vocab, tokens) != (config.vocab_size, expected):
            raise CannotTune(
                f"SSM {model} has a vocabulary of {vocab} and tokenizer {tokens[:12]}, but LLM {settings.llm} has "
                f"{config.vocab_size} and {expected[:12]}; use one with the LLM's tokenizer"
            )
    return resolved


def jobs_of(settings: TuneSettings, llm: Path, config: ModelConfig) -> list[Job]:
    """The prompts as tokens, each greedily and `samples` times at random; of long prompts the end is kept."""
    room = config.context_length - settings.new_tokens
    if room < 1:
        raise CannotTune(
            f"--new-tokens: got {settings.new_tokens}; the LLM's context is {config.context_length} tokens, with prompt"
        )
    tokenizer = Tokenizer.from_file(str(llm / "tokenizer.json"))
    encoded = tokenizer.encode_batch(list(read_prompts(settings.prompts)))
    return [
        Job(tuple(encoding.ids[-room:]), samples=sample > 0)
        for encoding in encoded
        for sample in range(1 + settings.samples)
    ]


def claim(record: Path, made_of: dict[str, Any]) -> None:
    """Note what a folder's content is made of; CannotTune when it has content made of something else."""
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if differing := [key for key in made_of if before.get(key) != made_of[key]]:
            key = differing[0]
            raise CannotTune(
                f"{record.parent} was begun with {key} = {before.get(key)!r}, now it is {made_of[key]!r}; give another "
                "folder, the first settings, or delete it"
            )
        return
    write_json(record, made_of)


def continuations_made_of(settings: TuneSettings, llm: Path) -> dict[str, Any]:
    prompts = hashlib.sha256(settings.prompts.read_bytes()).hexdigest()
    names = ("new_tokens", "samples", "seed")
    return {"llm": _weights_hash(llm), "prompts": prompts} | {name: getattr(settings, name) for name in names}


def tuned_of(settings: TuneSettings, llm: Path, starts: Sequence[SsmStart]) -> dict[str, Any]:
    ssms = [_weights_hash(Path(start.model)) if start.model else str(start) for start in starts]
    names = ("boost", "segment", "tokens", "batch", "learning_rate")
    return continuations_made_of(settings, llm) | {"ssms": ssms} | {name: getattr(settings, name) for name in names}


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
