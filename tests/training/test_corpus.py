"""Text becomes tokens once, whole, with a held-out share of every file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer

from training.corpus import END_OF_TEXT, CorpusFile, sample_windows, spread_windows, tokenize_corpus
from training.tokenizer import save_tokenizer, train_tokenizer

DOCUMENTS = [f"Story {n}.\n" + "The quick brown fox jumps over the lazy dog.\n" * 400 for n in range(30)]


@pytest.fixture
def files(tmp_path: Path) -> list[CorpusFile]:
    plain, packed = tmp_path / "plain.txt", tmp_path / "packed.txt.gz"
    plain.write_text(f"\n{END_OF_TEXT}\n".join(DOCUMENTS))
    with gzip.open(packed, "wt") as file:
        file.write("Où est 猫? 🐈\n" + END_OF_TEXT)
    return [CorpusFile(plain), CorpusFile(packed)]


@pytest.fixture
def tokenizer(files: list[CorpusFile]) -> Tokenizer:
    return train_tokenizer(files, 600)


def test_a_file_and_its_repeats() -> None:
    assert CorpusFile.parse("a/b.txt:3") == CorpusFile(Path("a/b.txt"), 3)
    assert CorpusFile.parse("a/b.txt") == CorpusFile(Path("a/b.txt"), 1)


@pytest.mark.parametrize("text", ["plain", "  spaces  ", "Où est 猫? 🐈\x00", "12345", ""])
def test_any_text_round_trips(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2024").ids] == ["2", "0", "2", "4"]


def test_nothing_is_lost_and_the_held_out_share_is_apart(files: list[CorpusFile], tokenizer: Tokenizer) -> None:
    training, held_out = tokenize_corpus(files, tokenizer, held_out_every=10)
    whole, _ = tokenize_corpus(files, tokenizer, held_out_every=10**9)
    assert len(training) + len(held_out) == len(whole)
    assert 0.05 < len(held_out) / len(whole) < 0.15
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert np.count_nonzero(whole == end) == len(DOCUMENTS) + 1
    text = tokenizer.decode(whole.tolist(), skip_special_tokens=True)
    assert text == "".join(document.strip() for document in DOCUMENTS) + "Où est 猫? 🐈"


def test_repeats_multiply_the_training_share_only(files: list[CorpusFile], tokenizer: Tokenizer) -> None:
    once, held_out = tokenize_corpus(files[:1], tokenizer)
    thrice, same = tokenize_corpus([CorpusFile(files[0].path, 3)], tokenizer)
    assert len(thrice) == 3 * len(once)
    assert np.array_equal(held_out, same)


def test_windows(tokenizer: Tokenizer) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    windows = sample_windows(tokens, 5, 10, np.random.default_rng(0))
    assert windows.shape == (5, 10)
    assert bool((windows.diff() == 1).all())
    spread = spread_windows(tokens, 4, 10)
    assert spread[0, 0] == 0
    assert spread[-1, -1] == 998


def test_a_tokenizer_without_the_end_is_refused(files: list[CorpusFile]) -> None:
    with pytest.raises(ValueError, match="lacks the token"):
        tokenize_corpus(files, Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}'))


def test_transformers_reads_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:

    save_tokenizer(tokenizer, tmp_path / "out", context=77)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.model_max_length == 77
    assert loaded.eos_token == END_OF_TEXT
    assert loaded("The quick fox")["input_ids"] == tokenizer.encode("The quick fox").ids
