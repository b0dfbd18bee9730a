"""How the server's readiness follows the engine's: a Python model has no say in that in Triton 2.51.

A model that failed to load makes the whole server not ready, and `tensorrt_llm_bls`, which needs the engine, is the one
that does: while the engine is down it is loaded with a parameter that makes it refuse, with the reason. It needs
tritonserver to run with explicit model control, as `pt-trtllm serve` starts it; elsewhere only requests tell.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import urllib.request
from collections.abc import Mapping
from typing import Any

from pt_trtllm import env
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.control import CONTROL_HEADER, IS_RESTARTED

MODEL = "tensorrt_llm_bls"
PARAMETER = "engine_failure"
TIMEOUT_S = 30.0


def refuse_if_engine_is_down(parameters: Mapping[str, str]) -> None:
    if PARAMETER in parameters:
        raise ServingError(f"{IS_RESTARTED}: {parameters[PARAMETER]}")


class HealthSignal:
    """Talks to the server's HTTP port. The Python backend has calls for this, but in 2.51 they end the server when
    other threads of the model are busy with it."""

    def __init__(self) -> None:
        self._url, self._key = env.TRITON_CONTROL_URL.get(), env.TRITON_CONTROL_KEY.get()
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._follow, name="pt-trtllm-health", daemon=True).start()

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
                self._ask("load", {})
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

    def _ask(self, action: str, body: dict[str, Any]) -> None:
        if not self._url:
            return
        request = urllib.request.Request(
            f"{self._url}/v2/repository/models/{MODEL}/{action}",
            data=json.dumps(body).encode(),
            headers={CONTROL_HEADER: self._key},
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
