"""Logits on their way to rank 0: whole rows, or only the most likely tokens of every rank's share of the vocabulary.

Greedy and top-k sampling need no more than a few candidates, so that most steps gather some numbers per rank and row
instead of the vocabulary. Which rows are reduced depends on their own request alone, never on the rest of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from pt_trtllm.network.step import StepBatch

MAX_CANDIDATES = 128
"""Per rank and row; beyond this a whole row is as cheap."""


@dataclass(frozen=True)
class Candidates:
    """The most likely tokens of one row, the most likely first; equally likely ones by their number."""

    values: torch.Tensor
    tokens: torch.Tensor
    first: int

    def __len__(self) -> int:
        return len(self.values)


Row = torch.Tensor | Candidates
"""float32 [vocabulary], or candidates."""


class Logits:
    """A step's rows on rank 0, in the order of `StepBatch.logit_rows`."""

    def __init__(self, rows: list[Row], *, finite: bool) -> None:
        self.rows, self.finite = rows, finite

    def whole_rows(self) -> torch.Tensor:
        """float32 [rows, vocabulary], where all rows are whole."""
        return torch.stack([row for row in self.rows if isinstance(row, torch.Tensor)])

    @classmethod
    def whole(cls, values: torch.Tensor) -> Logits:
        """values: float32 [rows, vocabulary]"""
        return cls(list(values), finite=bool(torch.isfinite(values).all()))


def most_likely(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, tokens) [rows, count], the most likely first; of equally likely ones those with lower numbers.

    More than `count` may be asked for without a change in the first ones.
    """
    if count == 1:
        tokens = rows.argmax(dim=1, keepdim=True)
        return rows.gather(1, tokens), tokens
    values, tokens = rows.topk(count, dim=1)
    if count:  # topk takes any of equals: look again where there are some beyond it
        for row in ((rows >= values[:, -1:]).sum(dim=1) > count).nonzero()[:, 0].tolist():
            tokens[row] = rows[row].argsort(descending=True, stable=True)[:count]
    tokens = tokens.sort(dim=1).values
    values, order = rows.gather(1, tokens).sort(dim=1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def pack(shard: torch.Tensor, batch: StepBatch, *, first_token: int, head_rows: int) -> torch.Tensor:
    """What a rank sends of its [rows, its tokens]: [1, numbers], equally many on every rank.

    Whole rows (filled up to `head_rows` tokens), then candidates: their logits, then their tokens (exact in float32).
    """
    whole = functional.pad(shard[batch.row_top_k == 0], (0, head_rows - shard.shape[1]))
    top = shard[batch.row_top_k > 0]
    count = _candidates_per_rank(batch, head_rows)
    values, tokens = most_likely(top, min(count, shard.shape[1]))
    missing = (0, count - values.shape[1])
    values, tokens = functional.pad(values, missing, value=-math.inf), functional.pad(tokens, missing)
    return torch.cat([whole.reshape(-1), values.reshape(-1), (tokens + first_token).reshape(-1).float()])[None]


def unpack(gathered: torch.Tensor, batch: StepBatch, *, head_rows: int, vocab_size: int) -> Logits:
    """gathered: what all ranks packed, side by side; rank r has the tokens from r * head_rows on."""
    if not len(batch.logit_rows):
        return Logits([], finite=True)
    is_top = batch.row_top_k > 0
    num_top, count = int(is_top.sum()), _candidates_per_rank(batch, head_rows)
    num_whole = len(batch.logit_rows) - num_top
    sizes = [num_whole * head_rows, num_top * count, num_top * count]
    ranks = gathered.view(-1, sum(sizes))
    whole, values, tokens = (
        part.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1) if rows else part
        for part, rows in zip(ranks.split(sizes, dim=1), (num_whole, num_top, num_top), strict=True)
    )
    whole_rows, finite = iter(whole[:, :vocab_size]), True
    if num_whole:
        finite = bool(torch.isfinite(whole[:, :vocab_size]).all())
    if num_top:
        tokens = tokens.long()
        values, order = values.sort(dim=1, descending=True, stable=True)  # shards are in the order of tokens
        tokens = tokens.gather(1, order)
        finite &= all(map(math.isfinite, values[:, 0].tolist()))
    top_rows = iter(map(Candidates, values, tokens, tokens[:, 0].tolist()) if num_top else ())
    return Logits([next(top_rows) if top else next(whole_rows) for top in is_top.tolist()], finite=finite)


def _candidates_per_rank(batch: StepBatch, head_rows: int) -> int:
    return min(int(batch.row_top_k.max()), head_rows) if len(batch.row_top_k) else 0
