"""Runs the front end until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from aiohttp import web

from pt_trtllm.errors import ServingError
from pt_trtllm.openai.app import make_app
from pt_trtllm.openai.options import FrontEndOptions


def serve(options: FrontEndOptions, on_ready: Callable[[str], None]) -> None:
    """Blocks until SIGINT or SIGTERM, then lets answers on their way end. `on_ready` is told the address."""
    asyncio.run(_serve(options, on_ready))


async def _serve(options: FrontEndOptions, on_ready: Callable[[str], None]) -> None:
    # Cancellation: when a client leaves, its handler ends at once, and with it the request in Triton.
    runner = web.AppRunner(
        make_app(options),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=options.shutdown_timeout_s,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, options.host, options.port).start()
        except OSError as error:
            raise ServingError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from None
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        host, port = runner.addresses[0][:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
    finally:
        await runner.cleanup()
