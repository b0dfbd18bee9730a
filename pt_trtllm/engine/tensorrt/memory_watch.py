"""How much memory a build really takes: anonymous pages, which a machine must have; mapped files can be dropped."""

from __future__ import annotations

import threading
from pathlib import Path

INTERVAL_S = 0.02


class MemoryWatch:
    """Samples this process from its making until `stop`. The kernel keeps no peak of anonymous memory."""

    def __init__(self) -> None:
        self._start = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stop.set()
        self._thread.join()
        return {"start_anonymous_bytes": self._start, "peak_anonymous_bytes": max(self._peak, anonymous_bytes())}

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0
