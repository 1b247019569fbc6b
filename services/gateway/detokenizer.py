"""Tokens to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Self

from services.gateway.tokenizer import GatewayTokenizer

# More tokens than a character has bytes, with room for special tokens, which have none.
TAIL_TOKENS = 16


class Detokenizer:
    """Text of one token sequence, a token at a time; O(bytes of the token) each.

    The concatenated pieces are the text of the whole sequence, however it was cut: a character is given out with the
    token that completes it, and bytes that can never become a character give U+FFFD for each maximal invalid part (as
    Unicode recommends; the standard, section 3.9).
    """

    def __init__(self, tokenizer: GatewayTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    @classmethod
    def behind(cls, tokenizer: GatewayTokenizer, token_ids: Sequence[int]) -> Self:
        """One that goes on where these tokens end, whose text nobody asks for; O(1) for ordinary tokens."""
        detokenizer = cls(tokenizer)
        detokenizer._at_start = all(map(tokenizer.is_special, token_ids))
        detokenizer.push_all(token_ids[-TAIL_TOKENS:])
        return detokenizer

    def fork(self) -> Detokenizer:
        """An independent one in the same state."""
        fork = Detokenizer(self._tokenizer)
        fork._at_start = self._at_start
        fork._utf8.setstate(self._utf8.getstate())
        return fork

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._at_start and not self._tokenizer.is_special(token_id):
            self._at_start = False
            return self._utf8.decode(self._tokenizer.first_token_bytes(token_id))
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What is left of a character that never became whole: "" or U+FFFD."""
        return self._utf8.decode(b"", final=True)
