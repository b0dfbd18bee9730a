"""`python -m pt_trtllm.serving.front FOLDER MAY_MANAGE HTTP_SOCKET [METRICS_SOCKET]`, started by the launcher.

FOLDER has Triton's private sockets; the others are descriptors of sockets that listen where clients come.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

from aiohttp import web

from pt_trtllm.processes import take_descriptors
from pt_trtllm.serving.client_faults import keep_out_of_log
from pt_trtllm.serving.control import HTTP_SOCKET, METRICS_SOCKET
from pt_trtllm.serving.front.app import ASK, MANAGE, METRICS, READ, Front


async def _serve(folder: Path, may_manage: bool, descriptors: list[int]) -> None:
    keep_out_of_log()
    take_descriptors()
    posts = (ASK, MANAGE) if may_manage else (ASK,)
    fronts = [Front(folder / HTTP_SOCKET, gets=READ, posts=posts), Front(folder / METRICS_SOCKET, gets=METRICS)]
    for front, descriptor in zip(fronts, descriptors, strict=False):  # metrics can be elsewhere
        runner = web.AppRunner(front.app(), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.SockSite(runner, socket.socket(fileno=descriptor)).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2] == "1", [int(number) for number in sys.argv[3:]]))
