"""Cut prompts for tuning out of a corpus: beginnings of its documents and paragraphs.

python -m training.prompts --corpus stories.txt --corpus novels.txt.gz --count 6000 --out prompts.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from training.corpus import CorpusFile, read_documents

SHORTEST, LONGEST = 24, 320  # characters of a prompt
LONG_DOCUMENT = 20_000  # from this many characters on, every paragraph is a beginning


def beginnings(path: Path) -> Iterator[str]:
    """Texts that a prompt can be the beginning of: documents, or the paragraphs of documents as long as books."""
    for document in read_documents(path):
        parts = document.split("\n\n") if len(document) > LONG_DOCUMENT else [document]
        yield from (part.strip() for part in parts if len(part.strip()) > 2 * SHORTEST)


def cut(text: str, rng: np.random.Generator) -> str:
    """The beginning of a text, of random length, ending with a whole word."""
    length = int(rng.integers(SHORTEST, min(LONGEST, len(text) - SHORTEST) + 1))
    end = text.find(" ", length)
    return text[: end if end > 0 else length].rstrip()


def main(
    corpus: Annotated[list[str], typer.Option(help="Text file; documents end with <|endoftext|>. Repeatable.")],
    out: Annotated[Path, typer.Option(help='JSON Lines file that gets {"prompt": ...}.')],
    count: Annotated[
        int, typer.Option(min=1, help="Prompts of each file; a beginning may be cut more than once.")
    ] = 4000,
    seed: int = 0,
) -> None:
    """Cut prompts for `specserve tune` out of a corpus, as many of each file, in random order."""
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    for file in map(CorpusFile.parse, corpus):
        texts = list(beginnings(file.path))
        if not texts:
            raise typer.BadParameter(f"{file.path}: no document has {2 * SHORTEST} characters", param_hint="--corpus")
        rounds = [rng.permutation(len(texts)) for _ in range(-(-count // len(texts)))]
        prompts += [cut(texts[index], rng) for index in np.concatenate(rounds)[:count]]
        typer.echo(f"{file.path.name}: {count} prompts of {len(texts)} beginnings", err=True)
    lines = [json.dumps({"prompt": prompts[index]}, ensure_ascii=False) for index in rng.permutation(len(prompts))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
