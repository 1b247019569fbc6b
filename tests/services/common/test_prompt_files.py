"""Prompt files: the project's own, and bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.configurations import MIXED_PROMPTS
from services.common.prompt_files import BadPrompts, read_prompts


def test_the_projects_prompts_are_24_different_ones() -> None:
    prompts = read_prompts(MIXED_PROMPTS)
    assert len(set(prompts)) == len(prompts) == 24
    assert not any(prompt != prompt.strip() for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ('{"prompt": ""}\n', "line 1"),
        ('{"prompt": 3}\n', "line 1"),
        ("not json\n", "line 1"),
        ("", "holds no prompts"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(BadPrompts, match=message):
        read_prompts(path)


def test_a_prompt_may_hold_any_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n', encoding="utf-8")
    assert read_prompts(path) == ("a\u2028b\x85c", "d")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match="nowhere"):
        read_prompts(tmp_path / "nowhere.jsonl")
