"""Which tokens of which sequences go into the next forward pass."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.network.torch_ops import SequenceSlice, StepBatch
from pt_trtllm.runtime.request import Sequence


@dataclass(frozen=True)
class Step:
    """A batch, and what to do with each row of its logits: (sequence, prompt row or the one to sample from)."""

    batch: StepBatch
    rows: list[tuple[Sequence, bool]]
    """In order of the logits; True where the row decides the next token."""


class Scheduler:
    """Sequences join when a slot is free and leave when they end; long prompts are computed in chunks."""

    def __init__(self, limits: BuildLimits) -> None:
        self._limits = limits
        self._free_slots = list(range(limits.max_batch_size))[::-1]
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def next_step(self) -> Step:
        """Running sequences go first (one token each), prompts fill what is left of `max_num_tokens`."""
        while self._free_slots and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self._running.append(sequence)
        budget = self._limits.max_num_tokens
        shares = []
        # Those with a single pending token are decoding; sorting is stable, so the order of arrival stays.
        for sequence in sorted(self._running, key=lambda s: s.num_pending > 1):
            count = min(sequence.num_pending, budget)
            if count:
                shares.append((sequence, count))
                budget -= count
        return self._assemble(shares)

    def finish_step(self) -> list[Sequence]:
        """Frees the slots of sequences that ended; returns them."""
        ended = [sequence for sequence in self._running if sequence.finish_reason]
        self._running = [sequence for sequence in self._running if not sequence.finish_reason]
        self._free_slots += [sequence.slot for sequence in ended]
        return ended

    def _assemble(self, shares: list[tuple[Sequence, int]]) -> Step:
        tokens: list[int] = []
        slices: list[SequenceSlice] = []
        logit_rows: list[int] = []
        rows: list[tuple[Sequence, bool]] = []
        for sequence, count in shares:
            first, past = len(tokens), sequence.num_computed
            tokens += sequence.token_ids[past : past + count]
            slices.append(SequenceSlice(slot=sequence.slot, num_tokens=count, past=past))
            decides = count == sequence.num_pending
            if sequence.request.context_logits and past < len(sequence.request.prompt_ids):
                logit_rows += range(first, first + count)
                rows += [(sequence, False)] * (count - 1) + [(sequence, decides)]
            elif decides:
                logit_rows.append(first + count - 1)
                rows.append((sequence, True))
            sequence.num_computed += count
        batch = StepBatch(
            token_ids=torch.tensor(tokens),
            sequences=tuple(slices),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )
        return Step(batch, rows)
