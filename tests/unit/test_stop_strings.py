"""Stop strings are found where a plain search finds them, at a cost that no string and no text can raise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.runtime.params import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from pt_trtllm.runtime.stop_strings import StopStrings

pytestmark = pytest.mark.unit

TEXT = st.text("ab", min_size=1, max_size=6)


@given(stop=st.lists(TEXT, min_size=1, max_size=4), pieces=st.lists(st.text("abc", max_size=5), max_size=12))
def test_they_are_found_where_a_plain_search_finds_them(stop: list[str], pieces: list[str]) -> None:
    looking, text = StopStrings(stop), ""
    for piece in pieces:
        ends = range(len(text) + 1, len(text) + len(piece) + 1)
        text += piece
        expected = [(end - len(one), one) for one in stop for end in ends if text[:end].endswith(one)]
        assert looking.read(piece) == sorted(expected, key=lambda match: match[0])
        open_ends = [n for one in stop for n in range(len(one)) if text.endswith(one[:n])]
        assert looking.num_open == max(open_ends)


def test_the_worst_strings_cost_two_comparisons_a_character() -> None:
    counted = 0

    class Counting(str):
        def __getitem__(self, index: object) -> str:
            nonlocal counted
            counted += 1
            return str.__getitem__(self, index)  # type: ignore[index]

    looking = StopStrings(["a" * (MAX_STOP_LENGTH - 2) + end for end in ("bb", "cc")] * (MAX_STOP_STRINGS // 2))
    for pattern in looking._patterns:
        pattern.text = Counting(pattern.text)
    for _ in range(100):
        looking.read("aaaaaaaab")
    assert counted <= 4 * MAX_STOP_STRINGS * 900
