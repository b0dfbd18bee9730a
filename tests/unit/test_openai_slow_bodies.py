"""Bodies that come slowly hold up no other, and all together they take a bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from pt_trtllm.openai import body
from pt_trtllm.openai.body import MAX_LARGE, Bodies
from pt_trtllm.openai.errors import ApiError

pytestmark = pytest.mark.unit

WAIT_S = 60.0
Connect = Callable[[bytes], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(data: bytes) -> bytes:
    return HEAD + chunk(data) + b"0\r\n\r\n"


async def status_of(reader: asyncio.StreamReader) -> int:
    return int((await asyncio.wait_for(reader.readline(), WAIT_S)).split()[1])


def run(bodies: Bodies, ask: Callable[[Connect], Awaitable[None]]) -> None:
    """`ask` talks to a server that does nothing but read bodies."""

    async def answer(request: web.Request) -> web.Response:
        try:
            async with bodies.parsed(request, lambda value: value) as value:
                return web.json_response(len(value))
        except ApiError as error:
            return web.Response(status=error.status)

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/", answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        writers: list[asyncio.StreamWriter] = []

        async def connect(data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
            writers.append(writer)
            writer.write(data)
            return reader, writer

        await ask(connect)
        for writer in writers:
            writer.close()
        while bodies._held:
            await asyncio.sleep(0.01)
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(serve(), 2 * WAIT_S))


def test_slow_bodies_hold_up_no_other() -> None:
    bodies, large = Bodies(), b"[" + b"1," * (body.LARGE_BYTES // 2 + 1) + b"1]"

    async def ask(connect: Connect) -> None:
        for _ in range(2 * MAX_LARGE):
            await connect(HEAD + chunk(large[:-1]))
        while bodies._held < 2 * MAX_LARGE * (len(large) - 1):
            await asyncio.sleep(0.01)
        for data in (b"[]", large):
            reader, _ = await connect(whole(data))
            assert await status_of(reader) == 200

    run(bodies, ask)


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_HELD_BYTES", 100)
    bodies = Bodies()

    async def ask(connect: Connect) -> None:
        first, writer = await connect(HEAD + chunk(b"[" * 80))
        while bodies._held < 80:
            await asyncio.sleep(0.01)
        reader, _ = await connect(whole(b"[" + b" " * 40 + b"]"))
        assert await status_of(reader) == 429
        writer.write(chunk(b"]" * 80) + b"0\r\n\r\n")
        assert await status_of(first) == 429
        reader, _ = await connect(whole(b"[" + b" " * 40 + b"]"))
        assert await status_of(reader) == 200, "what was refused is held no longer"

    run(bodies, ask)


@pytest.mark.parametrize(("sent", "status"), [(whole(b"[" + b" " * 200 + b"]"), 413), (HEAD + chunk(b"["), 408)])
def test_bodies_without_an_end(monkeypatch: pytest.MonkeyPatch, sent: bytes, status: int) -> None:
    monkeypatch.setattr(body, "MAX_BODY_BYTES", 100)
    monkeypatch.setattr(body, "READ_TIMEOUT_S", 0.5)

    async def ask(connect: Connect) -> None:
        reader, _ = await connect(sent)
        assert await status_of(reader) == status

    run(Bodies(), ask)
