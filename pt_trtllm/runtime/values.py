"""Values that clients send: what they are, and how a message shows them."""

from __future__ import annotations

from typing import Any

MAX_TOKEN_ID = (1 << 31) - 1
SHOWN_LENGTH = 80
SHOWN_ITEMS = 8


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


def shown(value: Any) -> str:
    """For a message: short, on one line, and without the digits of numbers that Python refuses to spell."""
    if is_whole(value) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(shown, value[:SHOWN_ITEMS])) + (", ..." if len(value) > SHOWN_ITEMS else "")
        return _cut(f"[{inner}]")
    if isinstance(value, dict):
        some = ", ".join(f"{shown(key)}: {shown(entry)}" for key, entry in list(value.items())[:SHOWN_ITEMS])
        return _cut("{" + some + (", ..." if len(value) > SHOWN_ITEMS else "") + "}")
    if isinstance(value, str):
        return _cut(repr(value[:SHOWN_LENGTH]))
    return _cut(" ".join(str(value).split()))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + "..."
