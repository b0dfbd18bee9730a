"""What the server's launcher and its models tell each other, besides what Triton carries.

Triton stops an ensemble between its steps, so a server that is told to exit cannot let streams end. The launcher asks
the cores first, through files of a private folder: no new requests, and then a word from each that it has none left.
"""

from __future__ import annotations

import os
from pathlib import Path

HTTP_SOCKET, METRICS_SOCKET = "http", "metrics"
"""Triton's own HTTP services listen on these, in the same folder: nobody but this user reaches them."""
QUEUE_IS_FULL, IS_RESTARTED = "Exceeds maximum queue size", "the engine is being restarted"
"""How refusals begin. TensorRT-LLM's users look for the first; programs look at the kind of the error instead."""
ORDER = "drain"
WAIT, END = "wait", "end"
"""Let what is running end by itself; end it where it is."""


class DrainOrder:
    """The launcher's side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def give(self, order: str) -> None:
        _write(self._folder / ORDER, order)

    def num_left(self) -> int:
        """Requests that run in cores that are alive; a core that has not answered yet counts as one."""
        left = 0
        for path in self._folder.glob("core-*"):
            if Path(f"/proc/{path.name.partition('-')[2]}").exists():
                text = path.read_text()
                left += int(text) if text else 1
        return left


class DrainFollower:
    """A core's side; without a folder there is never an order."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.order = ""
        if folder is not None:
            _write(folder / f"core-{os.getpid()}", "")

    def look(self, num_running: int) -> str:
        """The order, if there is one; answers it with the number of requests that are left."""
        if self._folder is not None and (self._folder / ORDER).exists():
            self.order = (self._folder / ORDER).read_text()
            _write(self._folder / f"core-{os.getpid()}", str(num_running))
        return self.order


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
