"""What one token stands for by itself: its true bytes, and a text that tells it from every other token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pt_trtllm.runtime.tokenizer import Tokenizer

KEPT = 1 << 16
"""Tokens whose bytes are remembered."""


def byte_alphabet() -> dict[str, int]:
    """Character: byte, as byte-level vocabularies spell bytes. Printable ones of Latin-1 stand for themselves; the
    others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


class TokenText:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_json()).get("decoder")
        self._alphabet = byte_alphabet() if "ByteLevel" in _types(decoder) else {}
        self.bytes_of = lru_cache(KEPT)(self._bytes_of)

    def is_in_text(self, token: int) -> bool:
        """Whether it adds to the text of an answer; special tokens do not."""
        return not self.tokenizer.is_silent(token)

    def text_of(self, token: int) -> str:
        """Part of a character has no text of its own; it is told by its bytes: \\xe9\\x9b."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in own)

    def name_of(self, token: int) -> str:
        """The form of completions, where a text of backslashes could be anything: bytes:\\xe9\\x9b."""
        text = self.text_of(token)
        return text if text.encode() == self.bytes_of(token) else f"bytes:{text}"

    def _bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.piece(token)
        if piece is None or not self.is_in_text(token):
            return self.tokenizer.token_text(token).encode()
        if self.tokenizer.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._alphabet:
            spelled = [self._alphabet.get(character) for character in piece]
            known = [byte for byte in spelled if byte is not None]
            return bytes(known) if len(known) == len(spelled) else piece.encode()
        return self._text_in_context(token).encode()

    def _text_in_context(self, token: int) -> str:
        """Some decoders drop the blank at a text's beginning, which is part of a token in its midst."""
        alone, twice = self.tokenizer.decode([token]), self.tokenizer.decode([token, token])
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone


def _types(decoder: Any) -> Iterator[str]:
    """Of a decoder and those it is made of."""
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for inner in decoder.get("decoders", []):
            yield from _types(inner)
