"""Prompts are beginnings of documents, cut at words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from training.prompts import LONGEST, SHORTEST

STORIES = [f"Story {n} is about a small cat that sat on a mat and looked at birds all day long." for n in range(20)]
BOOK = "\n\n".join(f"Paragraph {n} of a long book. " + "It rained and rained. " * 20 for n in range(80))


def test_prompts_of_stories_and_books(tmp_path: Path) -> None:
    stories, book, out = tmp_path / "stories.txt", tmp_path / "book.txt", tmp_path / "out" / "prompts.jsonl"
    stories.write_text("<|endoftext|>".join(STORIES))
    book.write_text(BOOK)
    flags = ["--corpus", stories, "--corpus", book, "--count", 30, "--out", out]
    subprocess.run([sys.executable, "-m", "training.prompts", *map(str, flags)], check=True, timeout=120)
    prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert len(prompts) == 60
    assert sum(prompt.startswith("Story") for prompt in prompts) == 30, "twenty stories, some cut twice"
    assert sum(prompt.startswith("Paragraph") for prompt in prompts) == 30
    for prompt in prompts:
        assert SHORTEST <= len(prompt) <= LONGEST + 20
        assert any(f"{prompt} " in f"{text} " for text in [*STORIES, BOOK]), "whole words"
