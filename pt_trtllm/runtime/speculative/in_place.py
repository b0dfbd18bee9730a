"""The draft engine on the ranks of the engine it guesses for, in turns with it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from pt_trtllm.runtime.request import Sequence
from pt_trtllm.runtime.speculative.draft_model import DraftModel, Mirror


class InPlaceProposer:
    def __init__(self, model: DraftModel, max_draft_len: int) -> None:
        self._model, self._max_draft_len = model, max_draft_len
        self._mirrors: dict[Sequence, Mirror | None] = {}

    def propose(self, sequences: SequenceABC[Sequence]) -> None:
        for sequence in sequences:
            if sequence not in self._mirrors:
                self._mirrors[sequence] = self._model.start(sequence.request, sequence.sampler.seed)
            mirror = self._mirrors[sequence]
            if mirror is not None:
                self._model.decide(mirror, sequence.output_ids[mirror.num_decided :])
        asked = {sequence: mirror for sequence in sequences if (mirror := self._mirrors[sequence]) is not None}
        for other in self._mirrors.values():
            if other is not None:
                other.sequence.paused = True
        while self._model.advance(list(asked.values()), self._max_draft_len):
            pass
        for sequence in sequences:
            mirror = asked.get(sequence)
            sequence.guesses = mirror.guesses if mirror is not None else []

    def forget(self, sequence: Sequence) -> None:
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._model.end(mirror)

    def close(self) -> None:
        self._mirrors.clear()
