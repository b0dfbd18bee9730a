"""Threads that everything depends on."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable


def start_essential(name: str, work: Callable[[], None]) -> threading.Thread:
    """Runs `work` in a thread of its own. Should that fail, the process ends and says why: whoever started it hears of
    that, and does not wait for what a silent process would never do."""

    def run() -> None:
        try:
            work()
        except BaseException:
            print(f"{name} failed, and this process cannot go on without it:", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class Complaints:
    """Tells the log what went wrong in a loop that goes on: each cause when it begins, not at every turn."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log, self._last = log, ""

    def __call__(self, what: str, error: Exception) -> None:
        text = f"{what}: {type(error).__name__}: {error}"
        if text != self._last:
            self._last = text
            self._log("".join([f"{text}\n", *traceback.format_exception(error)]))
