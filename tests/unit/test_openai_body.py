"""Bodies that no parser likes are refused with one line, and what is taken everything behind can work with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.openai.body import MAX_CONTAINERS, MAX_DEPTH, parse_json
from pt_trtllm.openai.errors import ApiError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"a": 1e400}', "beyond what 64 bits hold"),
        (b'{"a": [-1e400]}', "beyond what 64 bits hold"),
        (b'{"a": %d}' % 10**400, "beyond what 64 bits hold"),
        (b'{"a": %s}' % (b"9" * 10**5), "thousands of digits"),
        (b'{"a": ["\\ud800"]}', "not valid Unicode"),
        (b'{"a": {"\\udfff": 1}}', "not valid Unicode"),
        (b"[" * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
        (b"[" + b"[]," * MAX_CONTAINERS + b"1]", "too many brackets"),
    ],
    ids=range(14),
)
def test_what_cannot_be_worked_with_is_refused_in_one_line(body: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        parse_json(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_everything_else_is_taken() -> None:
    body = {"a": [1, -1, 2**64 - 1, 1.5, 1e300, "ü\U0001f642\ud83d"[:2], None, True], "é": {"b": []}}
    for spelled in (json.dumps(body), json.dumps(body, ensure_ascii=False)):
        assert parse_json(spelled.encode()) == body
    deep = b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH
    assert parse_json(deep) == json.loads(deep)


some_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=4)
    ),
)


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=60) | some_json.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_taken_or_refused(body: bytes) -> None:
    try:
        value: Any = parse_json(body)
    except ApiError:
        return
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
