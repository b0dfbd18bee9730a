"""One JSON line per request on stderr, with the id that the client and Triton know it by."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from aiohttp import web

from pt_trtllm.openai.errors import FAILED, ApiError

LOGGER = logging.getLogger("pt_trtllm.openai")
DETAILS = web.RequestKey("details", dict[str, Any])


def describe(request: web.Request, **details: Any) -> None:
    """Adds to what will be told about a request when it ends."""
    request.setdefault(DETAILS, {}).update(details)


def refusal_of(request: web.Request, error: Exception) -> ApiError:
    """What the client hears of an error. Of our own mistakes only that there was one: the log has the rest."""
    if not isinstance(error, ApiError):
        LOGGER.exception("%s %s failed", request.method, request.path)
        error = ApiError("internal error; the server's log has more", status=FAILED)
    describe(request, error=str(error))
    return error


def log_request(request: web.Request, request_id: str, status: int, started: float) -> None:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": request_id,
        "method": request.method,
        "path": request.path,
        "status": status,
        "ms": round((time.monotonic() - started) * 1e3, 1),
        **request.get(DETAILS, {}),
    }
    LOGGER.info(json.dumps(line))
