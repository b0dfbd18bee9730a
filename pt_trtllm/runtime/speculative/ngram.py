"""Prompt look-up: answers often repeat their prompt, or themselves."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from pt_trtllm.runtime.request import Sequence


class NgramProposer:
    """Guesses what followed when the latest tokens last occurred; longer matches are preferred."""

    def __init__(self, max_draft_len: int, max_size: int) -> None:
        self._max_draft_len, self._max_size = max_draft_len, max_size
        self._indices: dict[Sequence, NgramIndex] = {}

    def propose(self, sequences: SequenceABC[Sequence]) -> None:
        for sequence in sequences:
            index = self._indices.get(sequence)
            if index is None:
                index = self._indices[sequence] = NgramIndex(self._max_size, sequence.request.prompt_ids)
            index.extend(sequence.output_ids[index.length - len(sequence.request.prompt_ids) :])
            sequence.guesses = index.continuation(self._max_draft_len)

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)

    def close(self) -> None:
        self._indices.clear()


class NgramIndex:
    """Where every n-gram of a growing text last ended. Each token costs a few dictionary entries, once."""

    def __init__(self, max_size: int, tokens: SequenceABC[int]) -> None:
        self._tokens: list[int] = []
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_size)]
        """By size - 1: n-gram to the position behind it. The text's last n-grams are not in yet."""
        self.extend(tokens)

    @property
    def length(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: SequenceABC[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size, ends in enumerate(self._ends[:end], start=1):
                ends[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """What followed the longest of the last n-grams that occurred before."""
        for size in range(min(len(self._ends), self.length), 0, -1):
            end = self._ends[size - 1].get(tuple(self._tokens[-size:]))
            if end is not None:
                return self._tokens[end : end + count]
        return []
