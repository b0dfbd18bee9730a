"""One request for many answers asks for some at a time, and waits where its own answers fill the server's queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm.openai import fan_out
from pt_trtllm.openai.answers import Ask, Delta
from pt_trtllm.openai.errors import TOO_MANY, ApiError
from pt_trtllm.openai.fan_out import MAX_WAITING, STREAMS_PER_REQUEST, FanOut
from pt_trtllm.openai.tensors import Piece
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

TOKENIZER = Tokenizer(Path(__file__).parents[2] / "examples/tiny-pt")
(WORD,) = TOKENIZER.encode(" truth", add_special_tokens=False)


class SmallServer:
    """Has so many places; gives every answer the same word a few times."""

    def __init__(self, places: int, num_tokens: int = 3) -> None:
        self._places, self._num_tokens = places, num_tokens
        self.running = self.most = self.refused = self.sent = 0

    async def generate(self, request_id: str, values: Mapping[str, Any]) -> AsyncGenerator[Piece]:
        if self.running >= self._places:
            self.refused += 1
            raise ApiError("Exceeds maximum queue size", status=TOO_MANY, code="queue_full")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self._num_tokens):
                await asyncio.sleep(0)
                self.sent += 1
                yield Piece([WORD])
        finally:
            self.running -= 1


def asks(count: int) -> list[Ask]:
    params = SamplingParams(max_tokens=100)
    return [
        Ask(request_id=str(index), prompt_ids=(1,), params=params, end_ids=frozenset(), values={})
        for index in range(count)
    ]


async def collect(server: SmallServer, count: int) -> dict[int, str]:
    texts = dict.fromkeys(range(count), "")
    async for delta in FanOut(server, TOKENIZER).answers(asks(count)):  # type: ignore[arg-type]
        texts[delta.index] += delta.text
    return texts


def test_many_answers_are_asked_for_some_at_a_time() -> None:
    server = SmallServer(places=10**6)
    texts = asyncio.run(collect(server, 500))
    assert texts == dict.fromkeys(range(500), " truth truth truth")
    assert server.most == STREAMS_PER_REQUEST
    assert server.refused == 0


def test_a_server_of_two_places_answers_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out, "PAUSE_S", 0.0)
    server = SmallServer(places=2)
    assert len(asyncio.run(collect(server, 40))) == 40
    assert server.most == 2
    assert server.refused > 0


def test_a_single_answer_is_refused_at_once_and_several_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SmallServer(places=0)
    with pytest.raises(ApiError, match="queue size"):
        asyncio.run(collect(server, 1))
    assert server.refused == 1
    monkeypatch.setattr(fan_out, "PATIENCE_S", 0.1)
    monkeypatch.setattr(fan_out, "PAUSE_S", 0.01)
    with pytest.raises(ApiError, match="queue size"):
        asyncio.run(collect(server, 3))
    assert server.refused > 4


def test_who_reads_slowly_is_not_given_more_than_a_few_pieces() -> None:
    server = SmallServer(places=10**6, num_tokens=50)

    async def read_one() -> Delta:
        deltas = FanOut(server, TOKENIZER).answers(asks(400))  # type: ignore[arg-type]
        first = await anext(deltas)
        for _ in range(5000):
            await asyncio.sleep(0)
        await deltas.aclose()
        return first

    asyncio.run(read_one())
    assert server.sent <= MAX_WAITING + 2 * STREAMS_PER_REQUEST + 1
    assert server.running == 0
