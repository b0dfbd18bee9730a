"""What processes hold and leave behind: descriptors, shared memory, files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pt_trtllm.processes import command_line

FOLDERS = (Path("/dev/shm"), Path(tempfile.gettempdir()))


def left_on_disk() -> set[Path]:
    """Entries of the places where processes put what others shall find."""
    return {path for folder in FOLDERS for path in folder.iterdir()}


def descriptors(pids: Iterable[int]) -> dict[int, int]:
    """How many each process holds; without those that have ended."""
    counts = {}
    for pid in pids:
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
    for mark in ("pt_trtllm.runtime.worker", "tritonserver", "mpirun", "openai", "serve"):
        if any(mark in word for word in words[:5]):
            return mark if "stub" not in words[0] else f"model {_model(words)}"
    return f"model {_model(words)}" if "stub" in words[0] else " ".join(words)[:60]


def _model(words: list[str]) -> str:
    return next((Path(word).parents[1].name for word in words if word.endswith("model.py")), "?")
