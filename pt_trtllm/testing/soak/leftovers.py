"""What processes hold and leave behind: descriptors, shared memory, files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from pt_trtllm.processes import command_line, is_running

SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> set[str]:
    """Names of all there is on this machine, whoever made it."""
    return {path.name for path in SHARED_MEMORY.iterdir()}


def descriptors(pids: Iterable[int]) -> dict[int, int]:
    """How many each process holds; without those that have ended."""
    counts = {}
    for pid in filter(is_running, pids):
        with contextlib.suppress(OSError):
            counts[pid] = len(os.listdir(f"/proc/{pid}/fd"))
    return counts


def resident_mib(pids: Iterable[int]) -> dict[int, float]:
    sizes = {}
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            sizes[pid] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return sizes


def describe(pid: int) -> str:
    """A process by what it runs, short enough for a table."""
    words = command_line(pid).decode(errors="replace").split("\0")
    if model := next((Path(word).parents[1].name for word in words if word.endswith("/model.py")), ""):
        return f"model {model}"
    if "-m" in words[:-1]:
        return " ".join(words[words.index("-m") + 1 :][:2]).partition(" /")[0]
    return Path(words[0]).name
