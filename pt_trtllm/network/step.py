"""One forward pass as data: the new tokens of several sequences, laid end to end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class SequenceSlice:
    """A sequence's share of a step: `num_tokens` new tokens after `past` cached ones."""

    slot: int
    num_tokens: int
    past: int
    first_block: int = 0
    """`blocks` continue this slot's block table from here; 0 starts a new table."""
    blocks: tuple[tuple[int, ...], ...] = ()
    """Blocks of the KV cache that the slot did not have before, per group of layers (`kv_groups`): equally many, -1
    where that group's layers see nothing any more. Empty: nothing new."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    token_ids: torch.Tensor
    """[tokens] int64"""
    sequences: tuple[SequenceSlice, ...]
    logit_rows: torch.Tensor
    """[rows] int64: tokens whose logits are wanted"""
    row_top_k: tuple[int, ...]
    """For each of these rows, how many of the most likely tokens are enough; 0 asks for all logits."""

    @classmethod
    def with_whole_rows(
        cls, token_ids: torch.Tensor, sequences: tuple[SequenceSlice, ...], logit_rows: torch.Tensor
    ) -> StepBatch:
        """A step that asks for all logits of its rows."""
        return cls(token_ids=token_ids, sequences=sequences, logit_rows=logit_rows, row_top_k=(0,) * len(logit_rows))

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.sequences)

    @property
    def positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(s.past, s.past + s.num_tokens) for s in self.sequences])


def int64_tensor(values: Sequence[int]) -> torch.Tensor:
    """What torch.tensor makes of a few numbers, in a fraction of its time."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
