"""A client that takes an answer's events no more loses its connection, and with it what is computed for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiohttp import web

from pt_trtllm.openai import handlers
from pt_trtllm.openai.answers import Delta
from pt_trtllm.openai.replies import ChatReply
from pt_trtllm.openai.requests import parse_chat

pytestmark = pytest.mark.unit

EVENT, MANY, WAIT_S = 1 << 20, 1000, 60.0
"""Far more than a connection's buffers hold."""


async def long_answer() -> AsyncIterator[Delta]:
    for _ in range(MANY):
        yield Delta(index=0, text="x" * EVENT, num_tokens=1)


def test_who_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "SEND_TIMEOUT_S", 0.2)
    question = parse_chat({"messages": [{"role": "user", "content": "Hi"}], "stream": True})
    ended = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handlers._stream(request, ChatReply("id", "m", question, cast(Any, None)), long_answer(), [])
        finally:
            ended.set()

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        _, writer = await asyncio.open_connection(*runner.addresses[0][:2], limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(ended.wait(), WAIT_S)
        writer.close()
        await runner.cleanup()

    asyncio.run(run())
