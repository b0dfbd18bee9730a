"""Log-probabilities of tokens, and the most likely others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

LogprobRow = list[tuple[int, float, int]]
"""(token, log-probability, rank) of the token in question, then of the most likely others."""


@dataclass(frozen=True)
class Logprob:
    logprob: float
    """Natural logarithm of the model's own probability, before any sampling option."""
    rank: int
    """1 for the most likely token."""


TokenLogprobs = dict[int, Logprob]
"""By token id; the token in question comes first."""


def top_logprobs(logits: torch.Tensor, token: int, count: int) -> LogprobRow:
    """logits: float32 [vocabulary]."""
    logprobs = logits.log_softmax(dim=0)
    own = float(logprobs[token])
    row = [(token, own, 1 + int((logits > logits[token]).sum()))]
    if count:
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        ranked = enumerate(zip(tokens.tolist(), values.tolist(), strict=True), start=1)
        row += [(other, value, rank) for rank, (other, value) in ranked if other != token]
    return row


def from_rows(rows: Iterable[LogprobRow]) -> tuple[TokenLogprobs, ...]:
    return tuple({token: Logprob(logprob, rank) for token, logprob, rank in row} for row in rows)
