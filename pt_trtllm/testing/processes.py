"""Processes that have to end."""

from __future__ import annotations

import time
from collections.abc import Iterable

from pt_trtllm.processes import is_running


def wait_until_gone(pids: Iterable[int], timeout_s: float = 240.0) -> None:
    left, deadline = list(pids), time.monotonic() + timeout_s
    while left := [pid for pid in left if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
