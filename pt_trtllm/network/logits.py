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


Row = torch.Tensor | Candidates | int
"""float32 [vocabulary], or candidates, or just the most likely token (NO_TOKEN where the row is not finite)."""
NO_TOKEN = -1


class Logits:
    """A step's rows on rank 0, in the order of `StepBatch.logit_rows`."""

    def __init__(self, rows: list[Row], *, finite: bool) -> None:
        """`finite`: whether all rows are."""
        self.rows, self.finite = rows, finite

    def finite_rows(self) -> list[bool]:
        return [self.finite or _is_finite(row) for row in self.rows]

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
        first = rows.max(dim=1, keepdim=True)
        return first.values, first.indices
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
    count, top_k = _candidates_per_rank(batch, head_rows), batch.row_top_k
    if not all(top_k):
        whole_at = [row for row, k in enumerate(top_k) if not k]
        top_at = [row for row, k in enumerate(top_k) if k]
        whole = functional.pad(shard[whole_at] if top_at else shard, (0, head_rows - shard.shape[1])).reshape(-1)
        if not top_at:
            return whole[None]
        shard = shard[top_at]
    values, tokens = most_likely(shard, min(count, shard.shape[1]))
    if missing := count - values.shape[1]:
        values = functional.pad(values, (0, missing), value=-math.inf)
        tokens = functional.pad(tokens, (0, missing))
    parts = [values.reshape(-1), (tokens + first_token).reshape(-1).float()]
    return torch.cat(parts if all(top_k) else [whole, *parts])[None]


def unpack(gathered: torch.Tensor, batch: StepBatch, *, head_rows: int, vocab_size: int) -> Logits:
    """gathered: what all ranks packed, side by side; rank r has the tokens from r * head_rows on."""
    top_k, count = batch.row_top_k, _candidates_per_rank(batch, head_rows)
    if not top_k:
        return Logits([], finite=True)
    num_top = sum(map(bool, top_k))
    sizes = [(len(top_k) - num_top) * head_rows, num_top * count, num_top * count]
    ranks = gathered.view(-1, sum(sizes))
    if num_top == len(top_k) and max(top_k) == 1:
        return _most_likely_tokens(ranks.tolist(), num_top)
    whole, values, tokens = (
        part.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1) if rows else part
        for part, rows in zip(ranks.split(sizes, dim=1), (len(top_k) - num_top, num_top, num_top), strict=True)
    )
    whole = whole[:, :vocab_size]
    finite = num_top == len(top_k) or bool(torch.isfinite(whole).all())
    if num_top:
        values, order = values.sort(dim=1, descending=True, stable=True)  # shards are in the order of tokens
        tokens = tokens.long().gather(1, order)
        finite &= all(map(math.isfinite, values[:, 0].tolist()))
    whole_rows = iter(whole)
    top_rows = iter(map(Candidates, values, tokens, tokens[:, 0].tolist()) if num_top else ())
    return Logits([next(top_rows) if k else next(whole_rows) for k in top_k], finite=finite)


def _most_likely_tokens(ranks: list[list[float]], num_rows: int) -> Logits:
    """From every rank's best logits, then their tokens. A few numbers: plain Python is faster than tensors."""
    rows: list[Row] = []
    finite = True
    for row in range(num_rows):
        logits = [rank[row] for rank in ranks]
        is_finite = not any(map(math.isnan, logits)) and math.isfinite(best := max(logits))
        rows.append(int(ranks[logits.index(best)][num_rows + row]) if is_finite else NO_TOKEN)
        finite &= is_finite
    return Logits(rows, finite=finite)


def _is_finite(row: Row) -> bool:
    if isinstance(row, int):
        return row != NO_TOKEN
    return bool(torch.isfinite(row.values[:1] if isinstance(row, Candidates) else row).all())


def _candidates_per_rank(batch: StepBatch, head_rows: int) -> int:
    return min(max(batch.row_top_k, default=0), head_rows)
