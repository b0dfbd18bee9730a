"""One answer on its way out: tokens come in from the engine, pieces of text and tokens go out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pt_trtllm.runtime.detokenize import AnswerText
from pt_trtllm.runtime.logprobs import LogprobRow
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new since the last piece."""

    token_ids: list[int]
    text: str
    logprobs: list[LogprobRow] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    """Why the engine could not go on; finish_reason is then "error"."""


class Answer:
    """Stands in for the queue of a request's events (`World.submit`); `on_event` is told when there is news.

    Events arrive in the engine's reader thread and wait here; one other thread takes them out. Where that thread is
    slower than the engine, several tokens go out in one piece.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, on_event: Callable[[Answer], None]) -> None:
        self.request = request
        self.id: int | None = None
        """The engine's name for it, once it was submitted."""
        self.started = time.monotonic()
        self.first_token: float | None = None
        self.num_tokens = 0
        self.ended_as: str | None = None
        """Says instead of "cancelled" why it was cancelled."""
        self.finished = False
        self._on_event = on_event
        self._events: deque[Any] = deque()
        self._lock = threading.Lock()
        self._is_announced = False
        self._text = AnswerText.of(tokenizer, request.params, request.prompt_ids)
        self._num_shown = 0

    def put(self, event: Any) -> None:
        with self._lock:
            self._events.append(event)
            if self._is_announced:
                return
            self._is_announced = True
        self._on_event(self)

    def take(self) -> Piece | None:
        """Everything that has come; None when that is nothing."""
        with self._lock:
            events, self._events, self._is_announced = self._events, deque(), False
        if not events or self.finished:
            return None
        tokens: list[int] = []
        logprobs: list[LogprobRow] = []
        reason: str | None = None
        error: Exception | None = None
        for event in events:
            if isinstance(event, Exception):
                reason, error = "error", event
                break
            _, new, reason, extras = event
            tokens += new
            logprobs += extras.get("logprobs", ())
        if tokens and self.first_token is None:
            self.first_token = time.monotonic()
        self.num_tokens += len(tokens)
        for token in tokens:
            self._text.add(token)
        if reason:
            self._text.finish()
            self.finished = True
            if reason == "cancelled" and self.ended_as:
                reason = self.ended_as
        visible = self._text.visible
        text, self._num_shown = visible[self._num_shown :], len(visible)
        return Piece(token_ids=tokens, text=text, logprobs=logprobs, finish_reason=reason, error=error)
