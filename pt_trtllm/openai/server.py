"""Runs the front end until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from aiohttp import web

from pt_trtllm.errors import ConfigError, ServingError
from pt_trtllm.openai.app import make_app
from pt_trtllm.openai.options import FrontEndOptions
from pt_trtllm.processes import take_descriptors
from pt_trtllm.serving.client_faults import keep_out_of_log


def serve(options: FrontEndOptions, on_ready: Callable[[str], None]) -> None:
    """Blocks until SIGINT or SIGTERM, then lets answers on their way end. `on_ready` is told the address."""
    asyncio.run(_serve(options, on_ready))


async def _serve(options: FrontEndOptions, on_ready: Callable[[str], None]) -> None:
    tls = tls_context(options.tls_cert, options.tls_key) if options.tls_cert and options.tls_key else None
    # Cancellation: when a client leaves, its handler ends at once, and with it the request in Triton.
    runner = web.AppRunner(
        make_app(options),
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,  # what a few bytes may become has no bound
        shutdown_timeout=options.shutdown_timeout_s,
    )
    keep_out_of_log()
    take_descriptors()
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, options.host, options.port, ssl_context=tls).start()
        except OSError as error:
            raise ServingError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from None
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        host, port = runner.addresses[0][:2]
        on_ready(f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
    finally:
        await runner.cleanup()


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def refuse() -> NoReturn:  # otherwise the terminal would be asked
        raise ConfigError(f"{key}: is encrypted, expected a key without a password")

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"{certificate} and {key} are no certificate with its key in PEM: {error}") from None
    return context
