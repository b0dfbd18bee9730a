"""What guesses: it sets `Sequence.guesses`, the scheduler and the sampler do the rest."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Protocol

from pt_trtllm.runtime.request import Sequence


class Proposer(Protocol):
    def propose(self, sequences: SequenceABC[Sequence]) -> None:
        """Gives sequences that are about to get their next token guesses of those after it."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        ...

    def close(self) -> None: ...
