"""How models of the repository ask other models of the same server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class Calls:
    """The calls of one model instance, made from the thread that runs its `execute`.

    In Triton before 24.12 a C++ thread of the stub forgets each call that has ended, without Python's lock. Where its
    reference to the responses is the last one, that damages Python's memory and the process dies a little later. So
    they are kept here until the stub has certainly forgotten the call.
    """

    def __init__(self) -> None:
        self._ended: list[Any] = []

    def responses(self, request: Any) -> Iterator[Any]:
        """Of a decoupled model, as they come. A caller that leaves early waits for the last: a call must end."""
        running, has_ended = request.exec(decoupled=True), False
        try:
            yield from running
            has_ended = True
        finally:
            if not has_ended:
                for _ in running:
                    pass
            self._ended.append(running)

    def stop(self, core: str, stream: str) -> None:
        """`stream`: the id that our core gave it, or we gave the request; never what a client chose, for another client
        may have chosen the same. The stream ends normally."""
        inputs = [
            pb_utils.Tensor("input_ids", np.zeros((1, 1), np.int32)),
            pb_utils.Tensor("input_lengths", np.ones((1, 1), np.int32)),
            pb_utils.Tensor("request_output_len", np.ones((1, 1), np.int32)),
            pb_utils.Tensor("stop", np.ones((1, 1), bool)),
        ]
        stop = pb_utils.InferenceRequest(
            model_name=core, request_id=stream, requested_output_names=["output_ids"], inputs=inputs
        )
        for _ in self.responses(stop):
            pass

    @contextmanager
    def stopped_when_cancelled(self, sender: Any, core: str, request_id: str, period_s: float) -> Iterator[None]:
        """While the block waits for the core's only response: stops the core's request when the client has left."""
        has_ended = threading.Event()

        def watch() -> None:
            while not has_ended.wait(period_s):
                if sender.is_cancelled():
                    self.stop(core, request_id)
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            has_ended.set()
            watcher.join()  # the sender may not be asked anything after the final response

    def is_cancelled(self, asked: Any) -> bool:
        """Of a request or its sender. The question waits in the same queue as the ends of calls, unless its answer is
        known to be yes: after a no, all calls that ended before are forgotten."""
        if asked.is_cancelled():
            return True
        self._ended.clear()
        return False
