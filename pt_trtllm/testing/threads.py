"""Threads of one process as ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ThreadExchange:
    """What `pt_trtllm.comm.exchange` asks for, between `size` threads."""

    def __init__(self, size: int, timeout_s: float = 240.0) -> None:
        self._barrier = threading.Barrier(size, timeout=timeout_s)
        self._slots = [b""] * size

    def for_rank(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def exchange(mine: bytes) -> list[bytes]:
            self._slots[rank] = mine
            self._barrier.wait()
            everyone = list(self._slots)
            self._barrier.wait()
            return everyone

        return exchange
