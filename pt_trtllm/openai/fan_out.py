"""All answers to one request: a bounded number at a time, however many it asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from pt_trtllm.openai.answers import Ask, Delta, answer_one
from pt_trtllm.openai.errors import TOO_MANY, ApiError
from pt_trtllm.openai.triton import TritonModel
from pt_trtllm.runtime.tokenizer import Tokenizer

STREAMS_PER_REQUEST = 16
MAX_STREAMS = 1024
"""Streams to Triton of all requests together; beyond them requests wait for their turn."""
MAX_WAITING = 256
"""Pieces that a client which reads slowly may leave unread before its streams wait, too."""
PATIENCE_S, PATIENCE_ONCE_BEGUN_S = 5.0, 60.0
"""How long a request of several answers goes on to ask a server whose queue is full, since its own last piece."""
PAUSE_S = 0.2


class FanOut:
    def __init__(self, model: TritonModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._streams = asyncio.Semaphore(MAX_STREAMS)

    async def answers(self, asks: Sequence[Ask]) -> AsyncGenerator[Delta]:
        """Every answer's pieces in the order they come. Leaving early cancels what is still being computed."""
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue(MAX_WAITING)
        left, patience = iter(enumerate(asks)), Patience(len(asks))
        tasks = [
            asyncio.create_task(self._follow(left, queue, patience)) for _ in range(min(len(asks), STREAMS_PER_REQUEST))
        ]
        try:
            unfinished = len(asks)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(
        self, left: Iterator[tuple[int, Ask]], queue: asyncio.Queue[Delta | Exception], patience: Patience
    ) -> None:
        """One answer after the other, until none is left or one fails."""
        try:
            for index, ask in left:
                while not await self._try(index, ask, queue, patience):
                    await asyncio.sleep(PAUSE_S)
        except Exception as error:  # raised where the answers are read
            await queue.put(error)

    async def _try(self, index: int, ask: Ask, queue: asyncio.Queue[Delta | Exception], patience: Patience) -> bool:
        """False when the server has no place for it now, but may have one later."""
        has_begun = False
        try:
            async with self._streams, aclosing(answer_one(self._model, self._tokenizer, index, ask)) as deltas:
                async for delta in deltas:
                    has_begun = True
                    patience.progressed()
                    await queue.put(delta)
        except ApiError as error:
            if error.status == TOO_MANY and not has_begun and patience.is_left():
                return False
            raise
        return True


class Patience:
    """Whether a full queue is a reason to wait. For a single answer it is not: its client should hear of it. Several
    answers may fill the queue by themselves, and a part of them is worth nothing."""

    def __init__(self, num_answers: int) -> None:
        self._limit_s = PATIENCE_S if num_answers > 1 else 0.0
        self._last = time.monotonic()

    def progressed(self) -> None:
        self._last, self._limit_s = time.monotonic(), PATIENCE_ONCE_BEGUN_S

    def is_left(self) -> bool:
        return time.monotonic() - self._last < self._limit_s
