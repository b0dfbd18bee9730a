"""What HTTP clients do wrong is theirs to hear: in a log each would be a page, and so a way to fill the disk."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

CLIENT_FAULTS = (HttpProcessingError, web.RequestPayloadError, ConnectionError)
"""What is no HTTP, bodies that cannot be decompressed, and connections that were left."""


def keep_out_of_log() -> None:
    """For servers that aiohttp runs in this process."""
    logging.getLogger("aiohttp.server").addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], CLIENT_FAULTS))
