"""Bodies that do not come, or come broken, end with a refusal, and fill no log."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from aiohttp import web

from pt_trtllm.serving.client_faults import keep_out_of_log
from pt_trtllm.serving.front import app
from pt_trtllm.serving.front.app import ASK, READ, Front

pytestmark = pytest.mark.unit

WAIT_S = 60.0
HEAD = b"POST /v2/models/x/infer HTTP/1.1\r\nHost: x\r\n"


async def answers(requests: list[bytes], triton: Path) -> list[bytes]:
    """What the front answers to each, on connections of their own."""
    runner = web.AppRunner(Front(triton, gets=READ, posts=(ASK,)).app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found = []
    for request in requests:
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        writer.write(request)
        found.append(await asyncio.wait_for(reader.readline(), WAIT_S))
        writer.close()
    await runner.cleanup()
    return found


def test_bad_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(app, "READ_S", 0.2)
    keep_out_of_log()
    caplog.set_level(logging.WARNING, "aiohttp.server")
    requests = {
        HEAD + b"Content-Length: 10\r\n\r\n{": b"408",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n": b"408",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nxxxx": b"400",
        HEAD + b"Content-Encoding: br\r\nContent-Length: 4\r\n\r\nxxxx": b"400",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n": b"400",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\nxxxx": b"400",
        b"nonsense\r\n\r\n": b"400",
        HEAD + b"Content-Length: 2\r\n\r\n{}": b"503",
    }
    statuses = [line.split()[1] for line in asyncio.run(answers(list(requests), tmp_path / "nobody"))]
    assert statuses == list(requests.values())
    assert not caplog.records
