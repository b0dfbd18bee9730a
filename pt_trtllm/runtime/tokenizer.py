"""Text to token ids and back, from a `tokenizer.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from pt_trtllm.errors import ConfigError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: no tokenizer.json; give a folder that has one with --tokenizer-dir")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for malformed files
            raise ConfigError(f"{path}: not a tokenizer: {error}") from None
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

    @property
    def longest_piece(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length divided by this, but for what a
        normaliser drops."""
        return max(map(len, self._backend.get_vocab()), default=0)

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
