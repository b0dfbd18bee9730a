"""How the server's readiness follows the engine's: a Python model has no say in that in Triton 2.51.

A model that failed to load makes the whole server not ready, and `tensorrt_llm_bls`, which needs the engine, is the one
that does: while the engine is down it is loaded with a parameter that makes it refuse, with the reason. It needs
tritonserver to run with explicit model control, as `pt-trtllm serve` starts it; elsewhere only requests tell.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pt_trtllm import env
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.control import HTTP_SOCKET, IS_RESTARTED
from pt_trtllm.serving.threads import start_essential

MODEL = "tensorrt_llm_bls"
PARAMETER = "engine_failure"
TIMEOUT_S, RETRY_S = 30.0, 1.0
NOT_ALLOWED = b"load / unload is not allowed"
"""How Triton says so."""


def refuse_if_engine_is_down(parameters: Mapping[str, str]) -> None:
    if PARAMETER in parameters:
        raise ServingError(f"{IS_RESTARTED}: {parameters[PARAMETER]}")


class HealthSignal:
    """Talks to the server's private HTTP socket. The Python backend has calls for this, but in 2.51 they end the
    server when other threads of the model are busy with it."""

    def __init__(self) -> None:
        folder = env.TRITON_CONTROL_DIR.get()
        self._socket = Path(folder) / HTTP_SOCKET if folder else None
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        start_essential("pt-trtllm-health", self._follow)

    def failed(self, reason: str) -> None:
        self._news.put(reason)

    def recovered(self) -> None:
        self._news.put(None)

    def _follow(self) -> None:
        """Apart from the engine's restart, which does not wait for it."""
        is_down = False
        while True:
            reason = self._news.get()
            if reason is None:
                # Until it is ready again, or there is other news: the server may be busy, or short of something.
                while not self._ask("load", {}) and self._news.empty():
                    time.sleep(RETRY_S)
            elif not is_down:
                config = {
                    "name": MODEL,
                    "backend": "python",
                    "input": [{"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]}],
                    "output": [{"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]}],
                    "parameters": {PARAMETER: {"string_value": " ".join(reason.split())}},
                }
                self._ask("unload", {})
                self._ask("load", {"parameters": {"config": json.dumps(config)}})  # fails, as it shall
            is_down = reason is not None

    def _ask(self, action: str, body: dict[str, Any]) -> bool:
        """Whether it was done, or cannot be: without a server of ours there is nobody to ask, and one that its user
        runs with another model control takes no orders."""
        if self._socket is None:
            return True
        with contextlib.suppress(OSError, http.client.HTTPException), _Connection(self._socket) as connection:
            connection.request("POST", f"/v2/repository/models/{MODEL}/{action}", json.dumps(body))
            response = connection.getresponse()
            return NOT_ALLOWED in response.read() or response.status == HTTPStatus.OK
        return False


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("triton", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
