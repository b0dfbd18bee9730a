"""Reading the fields of a request's JSON body: every field is known, and of the type it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pt_trtllm.openai.errors import ApiError
from pt_trtllm.runtime.values import is_number, is_whole

MAX_SHOWN = 80


class Kind(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_whole, value))


TEXT = Kind(lambda value: isinstance(value, str), "a string")
WHOLE = Kind(is_whole, "a whole number")
NUMBER = Kind(is_number, "a number")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
LIST = Kind(lambda value: isinstance(value, list), "a list")
TOKENS = Kind(lambda value: isinstance(value, list) and all(map(is_whole, value)), "a list of token ids")
TEXT_OR_TEXTS = Kind(lambda value: isinstance(value, str) or is_texts(value), "a string or a list of strings")
ANYTHING = Kind(lambda value: True, "anything")


def read_fields(body: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The fields that are set; null is the same as leaving a field out. Raises for unknown ones and wrong types."""
    if not isinstance(body, dict):
        raise ApiError(f"the body is {shown(body)}, expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in kinds:
            raise ApiError(f"Unrecognized request argument supplied: {name[:MAX_SHOWN]}", param=name[:MAX_SHOWN])
        if not kinds[name].holds(value):
            raise ApiError(f"{name} is {shown(value)}, expected {kinds[name].expected}", param=name)
    return given


def shown(value: Any) -> str:
    """A value in an error message, of bounded length."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
