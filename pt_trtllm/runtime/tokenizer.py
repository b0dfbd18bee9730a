"""Text to token ids and back, from a `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from pt_trtllm.errors import ConfigError


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: no tokenizer.json; give a folder that has one with --tokenizer-dir")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for malformed files
            raise ConfigError(f"{path}: not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens that the tokenizer's own template adds."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


def find_tokenizer(engine_dir: Path, tokenizer_dir: Path | None) -> Tokenizer | None:
    """The one asked for, else the one that came with the engine; None when there is none."""
    if tokenizer_dir is not None:
        return Tokenizer(tokenizer_dir)
    own = engine_dir / "tokenizer"
    return Tokenizer(own) if (own / "tokenizer.json").is_file() else None
