"""API keys: where they come from, and who has one."""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections.abc import Sequence
from pathlib import Path

from pt_trtllm.errors import ConfigError

SCHEME = "bearer"


class Keys:
    """The keys that clients may send. None at all lets everybody in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """Takes as long for a wrong key as for a right one, whichever it is: digests have one length, and all of
        them are compared."""
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        return scheme.lower() == SCHEME and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def is_key(text: str) -> bool:
    """Whether it can stand in a header as it is."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def read_key_file(path: Path) -> tuple[str, ...]:
    """One key a line; blank lines and those that begin with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the API keys: {error}") from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise ConfigError(f"{path}: has no API key, expected one a line")
    return keys


def is_private(path: Path) -> bool:
    """Whether nobody but its owner can read it."""
    return not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
