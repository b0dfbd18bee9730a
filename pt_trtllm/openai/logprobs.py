"""Log-probabilities of tokens in the two forms that OpenAI has: one per endpoint."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pt_trtllm.openai.token_text import TokenText

LOWEST = -9999.0
"""JSON has no infinity: what OpenAI writes for tokens that cannot occur."""


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float | None
    """None for the first token of a prompt: nothing comes before it."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens in its place, most likely first."""


def from_logits(logits: np.ndarray[Any, Any], tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """One entry per row: logits float32 [tokens, vocabulary], of which `count` most likely tokens are told."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    rows = []
    for row, token in zip(logprobs, tokens, strict=True):
        best = np.argsort(-row, kind="stable")[:count]
        rows.append(TokenLogprob(token, float(row[token]), tuple((int(other), float(row[other])) for other in best)))
    return rows


def from_row(row: Sequence[tuple[int, float, int]], count: int) -> TokenLogprob:
    """`row`: (token, log-probability, rank) of the token in question, then of the most likely others."""
    token, logprob, _ = row[0]
    best = sorted((rank, other, value) for other, value, rank in row if rank <= count)
    return TokenLogprob(token, logprob, tuple((other, value) for _, other, value in best[:count]))


def chat_logprobs(rows: Sequence[TokenLogprob], texts: TokenText) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": texts.text_of(token), "logprob": _finite(logprob), "bytes": list(texts.bytes_of(token))}

    return {
        "content": [
            {**entry(row.token, row.logprob), "top_logprobs": [entry(*other) for other in row.top]} for row in rows
        ],
        "refusal": None,
    }


class Offsets:
    """Where in an answer's text its tokens begin; a character that several tokens make up has one place."""

    def __init__(self, texts: TokenText) -> None:
        self._texts, self._length = texts, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        place = self._length
        if self._texts.is_in_text(token):
            self._length += len(self._decoder.decode(self._texts.bytes_of(token)))
        return place


def completion_logprobs(rows: Sequence[TokenLogprob], texts: TokenText, offsets: Offsets) -> dict[str, Any]:
    return {
        "tokens": [texts.name_of(row.token) for row in rows],
        "token_logprobs": [_finite(row.logprob) for row in rows],
        "top_logprobs": [
            None
            if row.logprob is None
            else {texts.name_of(token): _finite(logprob) for token, logprob in (*row.top, (row.token, row.logprob))}
            for row in rows
        ],
        "text_offset": [offsets.next(row.token) for row in rows],
    }


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, LOWEST)
