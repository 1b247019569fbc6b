"""Text to tokens, and the bytes behind each token."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TOKEN_CACHE = 1 << 16


class GatewayTokenizer:
    """A Hugging Face tokenizer, seen as a map from tokens to bytes.

    Bytes, not text, are what tokens concatenate to: a token may hold a part of a character. Byte-level vocabularies
    spell every byte as a printable character (GPT-2), byte-fallback ones have a token `<0xHH>` for each byte (Llama 2);
    any other token stands for the text that the tokenizer's own decoder gives it behind another token. Special tokens
    have no bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoders = _decoder_types(json.loads(tokenizer.to_str())["decoder"])
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        self._special = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.token_bytes = lru_cache(_TOKEN_CACHE)(self._token_bytes)

    @classmethod
    def from_folder(cls, folder: Path) -> GatewayTokenizer:
        """Read `tokenizer.json`; ValueError when it is not one."""
        path = folder / "tokenizer.json"
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception, with the reason in its text
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts around one."""
        return self._tokenizer.encode(text).ids

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark, such as end-of-text, rather than text."""
        return token_id in self._special

    def first_token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token that starts a text: SentencePiece decoders drop the space in front of it."""
        if self._byte_level or self._is_byte(token_id):
            return self.token_bytes(token_id)
        return self._tokenizer.decode([token_id]).encode()

    def token_name(self, token_id: int, starts_text: bool = False) -> str:
        """The token in a log-probabilities report: its text, or `bytes:\\xHH...` when it is part of a character."""
        if token_id in self._special:
            return self._special[token_id]
        data = self.first_token_bytes(token_id) if starts_text else self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:  # padding of the model's vocabulary has no token
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token is written as it is
                return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        # decode(t t) = first(t) + inner(t)
        return self._tokenizer.decode([token_id, token_id]).removeprefix(self._tokenizer.decode([token_id])).encode()

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return self._byte_fallback and token is not None and _BYTE_TOKEN.fullmatch(token) is not None


def _decoder_types(decoder: dict[str, object] | None) -> set[str]:
    if decoder is None:
        return set()
    nested = decoder.get("decoders", [])
    assert isinstance(nested, list)
    return {str(decoder["type"])}.union(*(_decoder_types(child) for child in nested))


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
