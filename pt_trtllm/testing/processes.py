"""Whether processes have ended."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path


def is_running(pid: int) -> bool:
    """False for a zombie too: an orphan stays one where nobody takes in the dead (an init that does not reap)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until_gone(pids: Iterable[int], timeout_s: float = 30.0) -> None:
    left, deadline = list(pids), time.monotonic() + timeout_s
    while left := [pid for pid in left if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
