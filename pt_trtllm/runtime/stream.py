"""A request on its way, on the client's side: what was asked, and what has come of it."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.runtime.detokenize import AnswerText
from pt_trtllm.runtime.logprobs import TokenLogprobs, from_rows
from pt_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from pt_trtllm.runtime.protocol import logits_file, read_logits
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.runtime.world import Events, World


class Stream:
    """One request and its samples. Their events arrive in `events`, each for `take`."""

    def __init__(
        self, prompt: str | None, request: Request, tokenizer: Tokenizer | None, events: Events | None = None
    ) -> None:
        """`events` takes the place of a queue of the stream's own."""
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._prompt, self._request = prompt, request
        self.samples = [
            Sample(index, own, tokenizer, events or self.events)
            for index, own in enumerate(
                dataclasses.replace(request, params=params, context_logits=request.context_logits and not index)
                for index, params in enumerate(request.params.samples())
            )
        ]

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)

    def take(self, event: tuple[Sample, Any]) -> None:
        """Raises when the request was refused or the world ended."""
        sample, content = event
        sample.take(content)

    def output(self, folder: Path) -> RequestOutput:
        """What there is so far; logits lie in the folder once the first sample has ended, and are taken from it."""
        first = self.samples[0]
        logits: torch.Tensor | None = None
        if self.finished and self._request.context_logits and first.id is not None:
            path = logits_file(folder, first.id)
            logits = read_logits(path)
            path.unlink()
        return RequestOutput(
            prompt=self._prompt,
            prompt_token_ids=self._request.prompt_ids,
            outputs=tuple(sample.output() for sample in self.samples),
            prompt_logits=logits,
            prompt_logprobs=None if first.prompt_logprobs is None else (None, *first.prompt_logprobs),
        )

    def cancel(self, world: World) -> None:
        """Ends what has not ended yet."""
        for sample in self.samples:
            if sample.id is not None and not sample.finish_reason:
                sample.finish_reason = "cancelled"
                world.cancel(sample.id)


class AsyncStream(Stream):
    """Hands events over to the event loop that asked."""

    def __init__(self, prompt: str | None, request: Request, tokenizer: Tokenizer | None) -> None:
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        super().__init__(prompt, request, tokenizer, _Forward(asyncio.get_running_loop(), self.inbox))


class Sample:
    """One answer; stands in for the queue of its request's events, and says whose they are."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None, events: Events) -> None:
        self.index, self.request, self._events = index, request, events
        self.id: int | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._answer = AnswerText.of(tokenizer, request.params, request.prompt_ids) if tokenizer else None

    def put(self, event: Any) -> None:
        self._events.put((self, event))

    def take(self, event: Any) -> None:
        if isinstance(event, BaseException):
            self.finish_reason = "error"
            raise event
        _, tokens, self.finish_reason, extras = event
        self.stop_reason = extras.get("stop_reason")
        self._ids += tokens
        self._logprobs += from_rows(extras.get("logprobs", ()))
        if "prompt_logprobs" in extras:
            self.prompt_logprobs = from_rows(extras["prompt_logprobs"])
        if self._answer is not None:
            for token in tokens:
                self._answer.add(token)
            if self.finish_reason:
                self._answer.finish()

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            token_ids=tuple(self._ids),
            text=self._answer.visible if self._answer else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs),
        )


class _Forward:
    """What the world's reader thread puts here arrives in an asyncio queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]) -> None:
        self._loop, self._inbox = loop, inbox

    def put(self, event: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, event)
