"""Training text as one flat array of token ids.

Knows nothing of models: it turns text files into tokens once, keeps them in memory, and cuts
random windows out of them. Documents in a file are separated by `<|endoftext|>`.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TokenArray = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class CorpusFile:
    """A text file and how often an epoch reads it, written `PATH` or `PATH:REPEATS`."""

    path: Path
    repeats: int = 1

    @classmethod
    def parse(cls, text: str) -> CorpusFile:
        path, _, repeats = text.rpartition(":")
        if path and repeats.isdigit():
            return cls(Path(path), int(repeats))
        return cls(Path(text))


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a text file (gzip by its `.gz` suffix), stripped, none empty."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    for document in text.split(END_OF_TEXT):
        if stripped := document.strip():
            yield stripped


def end_of_text(tokenizer: Tokenizer) -> int:
    """Id of END_OF_TEXT; ValueError when the tokenizer lacks it."""
    if (token_id := tokenizer.token_to_id(END_OF_TEXT)) is None:
        raise ValueError(f"the tokenizer lacks the token {END_OF_TEXT}")
    return token_id


def tokenize_corpus(
    files: list[CorpusFile], tokenizer: Tokenizer, held_out_every: int = 50
) -> tuple[TokenArray, TokenArray]:
    """Tokenize every file; return (training tokens, held-out tokens), each document closed by END_OF_TEXT.

    Long documents (novels) are cut into pieces of about 8000 characters, and every `held_out_every`-th piece
    of each file is held out, so that the held-out text has the corpus's own mixture.

    Raises:
        ValueError: the vocabulary does not fit 16 bits or lacks END_OF_TEXT.
    """
    end = end_of_text(tokenizer)
    if tokenizer.get_vocab_size() > 1 << 16:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries; at most 65536 are supported")
    training: list[TokenArray] = []
    held_out: list[TokenArray] = []
    for file in files:
        pieces = list(_pieces(file.path))
        parts: list[TokenArray] = []
        for start in track(range(0, len(pieces), 256), description=f"tokenize {file.path.name}"):
            batch = pieces[start : start + 256]
            for (_, closes), encoding in zip(batch, tokenizer.encode_batch([text for text, _ in batch]), strict=True):
                parts.append(np.array(encoding.ids + ([end] if closes else []), dtype=np.uint16))
        held_out += parts[held_out_every - 1 :: held_out_every]
        del parts[held_out_every - 1 :: held_out_every]
        training += parts * file.repeats
    return np.concatenate(training), np.concatenate(held_out or training[:1])


def _pieces(path: Path, size: int = 8000) -> Iterator[tuple[str, bool]]:
    """Yield (text, closes its document), cutting documents at line ends into pieces of about `size` characters."""
    for document in read_documents(path):
        start = 0
        while start < len(document):
            cut = document.find("\n", start + size)
            stop = len(document) if cut < 0 else cut + 1
            yield document[start:stop], stop == len(document)
            start = stop


def sample_windows(tokens: TokenArray, count: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    """Return `count` random windows, int64 [count, length]."""
    starts = rng.integers(0, len(tokens) - length, size=count)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


def spread_windows(tokens: TokenArray, count: int, length: int) -> torch.Tensor:
    """Return `count` windows spread evenly over `tokens`, int64 [count, length]; the same at every call."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))
