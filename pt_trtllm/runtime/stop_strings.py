"""Finding stop strings in a text as it grows."""

from __future__ import annotations

import functools
from collections.abc import Sequence


class StopStrings:
    """Looks at every character once per string, however long the strings are and whatever the text repeats."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = [_Pattern(text) for text in stop]
        self._num_read = 0

    def read(self, piece: str) -> list[tuple[int, str]]:
        """(beginning in the whole text, string) of those that became complete, the one that begins first in front."""
        found = [
            (self._num_read + end - len(pattern.text), pattern.text)
            for pattern in self._patterns
            for end in pattern.read(piece)
        ]
        self._num_read += len(piece)
        return sorted(found, key=lambda match: match[0])

    @property
    def num_open(self) -> int:
        """Characters at the text's end that may become part of a stop string."""
        return max((pattern.num_matched for pattern in self._patterns), default=0)


class _Pattern:
    """Knuth, Morris and Pratt's automaton."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        """Characters of the string with which the text so far ends; less than all of them."""
        self._shorter = _shorter_matches(text)

    def read(self, piece: str) -> list[int]:
        """Where in the piece the string ends."""
        if not self.num_matched and self.text[0] not in piece:
            return []
        ends = []
        for end, character in enumerate(piece, start=1):
            self.num_matched = _step(self.text, self._shorter, self.num_matched, character)
            if self.num_matched == len(self.text):
                ends.append(end)
                self.num_matched = self._shorter[-1]
        return ends


@functools.lru_cache(maxsize=1024)
def _shorter_matches(text: str) -> list[int]:
    """After n characters: how many the next shorter beginning has that the text so far ends with as well."""
    shorter = [0] * (len(text) + 1)
    for end in range(1, len(text)):
        shorter[end + 1] = _step(text, shorter, shorter[end], text[end])
    return shorter


def _step(text: str, shorter: list[int], matched: int, character: str) -> int:
    while matched and text[matched] != character:
        matched = shorter[matched]
    return matched + (text[matched] == character)
