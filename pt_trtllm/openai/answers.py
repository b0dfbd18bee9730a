"""An answer as it grows: text, log-probabilities, and why it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pt_trtllm.openai.logprobs import TokenLogprob, from_logits, from_row
from pt_trtllm.openai.tensors import Piece
from pt_trtllm.openai.triton import TritonModel
from pt_trtllm.runtime.detokenize import AnswerText
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What has been added to one answer."""

    index: int
    text: str
    rows: tuple[TokenLogprob, ...] = ()
    prompt_rows: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on."""
    num_tokens: int
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer to be made."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    end_ids: frozenset[int]
    values: Mapping[str, Any]
    """The request's tensors."""
    logprobs: int | None = None
    """How many of the most likely tokens to tell in each token's place."""


class Answer:
    def __init__(self, index: int, ask: Ask, tokenizer: Tokenizer) -> None:
        self._index, self._ask = index, ask
        self._text = AnswerText.of(tokenizer, ask.params, ask.prompt_ids)
        self._num_shown = 0
        self._num_tokens = 0
        self._last: int | None = None
        self.finished = False

    def take(self, piece: Piece) -> Delta:
        """Tokens behind a stop string are no part of the answer: the server may be some steps ahead."""
        count = 0
        for token in piece.tokens:
            count += 1
            self._last = token
            if self._text.add(token) or token in self._ask.params.stop_token_ids:
                self.finished = True
                break
        self._num_tokens += count
        return self._delta(piece, count, "stop" if self.finished else None)

    def finish(self, reason: str | None) -> Delta:
        """After the last piece; `reason` is what the server says, if it does."""
        self.finished = True
        if self._text.finish() or self._last in self._ask.end_ids:
            reason = "stop"
        return self._delta(Piece([]), 0, "stop" if reason == "stop" else "length")

    def _delta(self, piece: Piece, count: int, reason: str | None) -> Delta:
        visible = self._text.visible
        text, self._num_shown = visible[self._num_shown :], len(visible)
        return Delta(
            index=self._index,
            text=text,
            rows=self._rows(piece, count),
            prompt_rows=self._prompt_rows(piece),
            num_tokens=count,
            finish_reason=reason,
        )

    def _rows(self, piece: Piece, count: int) -> tuple[TokenLogprob, ...]:
        if self._ask.logprobs is None or not count:
            return ()
        if piece.rows is not None:
            return tuple(from_row(row, self._ask.logprobs) for row in piece.rows[:count])
        if self._ask.logprobs and piece.logits is not None:
            return tuple(from_logits(piece.logits[:count], piece.tokens[:count], self._ask.logprobs))
        return tuple(map(TokenLogprob, piece.tokens[:count], piece.logprobs or ()))

    def _prompt_rows(self, piece: Piece) -> tuple[TokenLogprob, ...]:
        if self._ask.logprobs is None or piece.prompt_logits is None:
            return ()
        following = self._ask.prompt_ids[1:]
        return tuple(from_logits(piece.prompt_logits[: len(following)], following, self._ask.logprobs))


LATE_PIECES = 8
"""That a server may send behind the end of an answer before it is told to stop."""


async def answer_one(model: TritonModel, tokenizer: Tokenizer, index: int, ask: Ask) -> AsyncGenerator[Delta]:
    """Waits for the server to end the stream by itself where it can: cancelling one that is just ending can leave a
    request behind in Triton, which then holds up the server's exit."""
    answer, reason, last, late = Answer(index, ask, tokenizer), None, None, 0
    patience = LATE_PIECES if "stop_words" in ask.values or not ask.params.stop else 0
    async with aclosing(model.generate(ask.request_id, ask.values)) as pieces:
        async for piece in pieces:
            if last is None:
                reason = piece.finish_reason or reason
                delta = answer.take(piece)
                if answer.finished:
                    last = delta
                elif delta.num_tokens:
                    yield delta
            late += last is not None
            if late > patience:
                break
    yield last or answer.finish(reason)
