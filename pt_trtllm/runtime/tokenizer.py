"""Text to token ids and back, from a `tokenizer.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from pt_trtllm.errors import ConfigError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CHUNK = 1 << 16
"""Characters that are counted at once."""
CHUNK_SLACK = 64
"""Tokens by which cutting a text at one place may change its number."""
USUAL_CHARACTERS = 4
"""A text of so many for each token is not longer than usual: it is tokenized at once."""


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: no tokenizer.json; give a folder that has one with --tokenizer-dir")
        self._backend = load_backend(path)
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    def to_json(self) -> str:
        text: str = self._backend.to_str()
        return text

    @property
    def vocab_size(self) -> int:
        """With added tokens; a model may have more, for padding."""
        size: int = self._backend.get_vocab_size()
        return size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids, by default with the special tokens that the tokenizer's own template adds."""
        _check_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_in_thread(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The same while other threads run: the library's `encode` keeps Python's lock. For processes that do not
        fork: it starts threads of its own."""
        _check_unicode(text)
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def check_fits(self, text: str, max_tokens: int, what: str) -> None:
        """Raises, before it is tokenized as a whole, for a text of surely more tokens."""
        if len(text) > max_tokens * self.longest_piece:
            raise ConfigError(
                f"{what} has {len(text)} characters, which exceeds maximum input length ({max_tokens}): so many tokens "
                f"have at most {max_tokens * self.longest_piece} characters; shorten it",
                kind="too_long",
            )
        if len(text) > max(CHUNK, USUAL_CHARACTERS * max_tokens) and self.has_more_tokens(text, max_tokens):
            raise ConfigError(
                f"{what} of {len(text)} characters exceeds maximum input length ({max_tokens}); shorten it",
                kind="too_long",
            )

    def has_more_tokens(self, text: str, limit: int) -> bool:
        """Counts up to the limit, in the memory that one piece of the text takes: a tokenizer needs some hundred bytes
        for each character that it is given at once."""
        count = 0
        for index, start in enumerate(range(0, len(text), CHUNK)):
            count += len(self.encode_in_thread(text[start : start + CHUNK], add_special_tokens=False))
            if count > limit + CHUNK_SLACK * (index + 1):
                return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """One token by itself; those that decoding leaves out have their names."""
        if self.is_silent(token):
            return self._backend.id_to_token(token) or f"<{token}>"
        return self.decode([token])

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary spells it."""
        text: str | None = self._backend.id_to_token(token)
        return text

    @cached_property
    def longest_piece(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length divided by this, but for what a
        normaliser drops."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def token_id(self, text: str) -> int | None:
        """The token of exactly this name, such as `<eos>`."""
        token: int | None = self._backend.token_to_id(text)
        return token

    def is_silent(self, token: int) -> bool:
        """Whether decoding leaves the token out: it is special, or unknown (a padded vocabulary)."""
        return token in self._special or self._backend.id_to_token(token) is None

    def is_byte(self, token: int) -> bool:
        """Whether the token is one byte of text (<0xE2>), which its neighbours give a meaning."""
        return BYTE_TOKEN.fullmatch(self._backend.id_to_token(token) or "") is not None


def load_backend(path: Path) -> Backend:
    """A `tokenizer.json` for whole texts: what it says about truncation and padding is left from its training, and is
    ignored, as `transformers` does."""
    try:
        backend = Backend.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises a bare Exception for malformed files, and a panic for some
        raise ConfigError(f"{path}: not a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None


def find_tokenizer(engine_dir: Path, tokenizer_dir: Path | None) -> Tokenizer | None:
    """The one asked for, else the one that came with the engine; None when there is none."""
    if tokenizer_dir is not None:
        return Tokenizer(tokenizer_dir)
    own = engine_dir / "tokenizer"
    return Tokenizer(own) if (own / "tokenizer.json").is_file() else None
