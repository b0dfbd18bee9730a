"""Values that clients send, and what they are."""

from __future__ import annotations

from typing import Any

MAX_TOKEN_ID = (1 << 31) - 1


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_token(value: Any) -> bool:
    """Of some vocabulary: ids are int32 on their way to the ranks."""
    return is_whole(value) and 0 <= value <= MAX_TOKEN_ID


def is_encodable(value: Any) -> bool:
    """Whether a text, or each of several, is free of surrogates, which have no UTF-8."""
    try:
        for text in (value,) if isinstance(value, str) else value or ():
            text.encode()
    except UnicodeEncodeError:
        return False
    return True
