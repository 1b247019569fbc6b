"""Tokens to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from services.gateway.tokenizer import GatewayTokenizer


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
