from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.gateway.detokenizer import Detokenizer
from services.gateway.tokenizer import GatewayTokenizer
from tests.services.gateway.tokenizers_for_tests import CORPUS, byte_fallback, byte_level

BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
FAMILIES = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
TEXTS = st.text(max_size=40) | st.sampled_from([*CORPUS, " leading space", "  two", "é日😀 a the on", "\n\t "])


def token_ids_of(tokens: list[str]) -> list[int]:
    token_ids = [BYTE_FALLBACK.token_to_id(token) for token in tokens]
    return [token_id for token_id in token_ids if token_id is not None]


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(GatewayTokenizer(tokenizer))
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@FAMILIES
@given(text=TEXTS)
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).ids
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@FAMILIES
@given(text=TEXTS)
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces(tokenizer, tokenizer.encode(text).ids))


@given(token_ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30))
def test_any_byte_level_tokens_give_what_the_library_decodes(token_ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@FAMILIES
@given(text=TEXTS, cut=st.integers(0, 40))
def test_a_completion_continues_its_prompt(tokenizer: Tokenizer, text: str, cut: int) -> None:
    token_ids = tokenizer.encode("a prompt" + text).ids
    cut = min(cut, len(token_ids))
    detokenizer = Detokenizer(GatewayTokenizer(tokenizer))
    prompt = detokenizer.push_all(token_ids[:cut])
    fork = detokenizer.fork()
    completion = detokenizer.push_all(token_ids[cut:]) + detokenizer.finish()
    assert prompt + completion == tokenizer.decode(token_ids)
    for same in (fork, Detokenizer.behind(GatewayTokenizer(tokenizer), token_ids[:cut])):
        assert same.push_all(token_ids[cut:]) + same.finish() == completion


def test_an_emoji_comes_with_its_last_byte() -> None:
    token_ids = token_ids_of([f"<0x{byte:02X}>" for byte in "😀".encode()])
    assert pieces(BYTE_FALLBACK, token_ids) == ["", "", "", "😀", ""]


def test_an_incomplete_character_is_replaced_at_the_end_only() -> None:
    token_ids = token_ids_of(["<0xF0>", "<0x9F>", "a"])
    assert pieces(BYTE_FALLBACK, token_ids) == ["", "", "\ufffda", ""]
    assert pieces(BYTE_FALLBACK, token_ids[:2]) == ["", "", "\ufffd"]


def test_special_tokens_and_padding_of_the_vocabulary_have_no_text() -> None:
    hello = BYTE_FALLBACK.encode("hello").ids
    assert "".join(pieces(BYTE_FALLBACK, [*hello, 2, 100_000])) == "hello"


def test_the_space_in_front_of_a_text_goes_only_there() -> None:
    assert pieces(BYTE_FALLBACK, token_ids_of(["<s>", "▁the", "▁the"])) == ["", "the", " the", ""]
