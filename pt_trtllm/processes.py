"""Processes of this machine, as /proc shows them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Container
from pathlib import Path

PARENT, USER_TIME, SYSTEM_TIME, EXIT_CODE = 1, 11, 12, 49
"""Columns of /proc/PID/stat behind the name; the first is the state."""
ENDED_OR_STOPPED = ("Z", "T")
"""States. A debugger's own is another one."""
MAX_DESCRIPTORS = 1 << 16


def descendants(pid: int) -> set[int]:
    """Processes below one, at this moment."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(entry.name)] = int(_status(int(entry.name))[PARENT])
    found, added = set[int](), {pid}
    while added:
        added = {child for child, parent in parents.items() if parent in added} - found
        found |= added
    return found


def processor_seconds(pid: int) -> float:
    """That a process and those below it have used until now, those that have ended left out."""
    ticks = 0
    for process in {pid, *descendants(pid)}:
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = _status(process)
            ticks += int(status[USER_TIME]) + int(status[SYSTEM_TIME])
    return ticks / os.sysconf("SC_CLK_TCK")


def with_environment(entry: str) -> set[int]:
    """This user's processes that were started with NAME=VALUE, or below one that was."""
    wanted, found = os.fsencode(entry), set[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if folder.stat().st_uid == os.getuid() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def lost_children(pid: int) -> dict[int, str]:
    """Children that have ended and that their parent has not asked for, or that a signal has stopped; each with how."""
    lost = {}
    for child in descendants(pid):
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = _status(child)
            if int(status[PARENT]) == pid and status[0] in ENDED_OR_STOPPED:
                lost[child] = "was stopped by a signal" if status[0] == "T" else f"ended with {_end(status)}"
    return lost


def take_in_orphans(besides: Container[int]) -> None:
    """Lets this process's dead children go that it did not start, but has become the parent of."""
    for child in descendants(os.getpid()):
        with contextlib.suppress(OSError, ChildProcessError):
            if child not in besides and _status(child)[0] == "Z" and parent(child) == os.getpid():
                os.waitpid(child, os.WNOHANG)


def end_processes(pids: set[int], grace_s: float = 5.0) -> None:
    """First asks, then kills, and takes in the dead."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        give_up = time.monotonic() + wait_s
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while (pids := {pid for pid in pids if not _is_gone(pid)}) and time.monotonic() < give_up:
            time.sleep(0.02)


def take_descriptors() -> None:
    """Lets this process hold as many as it may: one client alone could use up the usual 1,024 by connecting."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def command_line(pid: int) -> bytes:
    """Empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def state(pid: int) -> str:
    """A letter, as ps shows it; X when there is no such process."""
    try:
        return _status(pid)[0]
    except OSError:
        return "X"


def parent(pid: int) -> int:
    """0 where there is no such process."""
    try:
        return int(_status(pid)[PARENT])
    except OSError:
        return 0


def is_running(pid: int) -> bool:
    """False for a zombie too: an orphan stays one where nobody takes in the dead (an init that does not reap)."""
    return state(pid) not in ("Z", "X")


def _end(status: list[str]) -> str:
    code = os.waitstatus_to_exitcode(int(status[EXIT_CODE]))
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _is_gone(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):  # adopted by another process, or gone
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return True
    return not is_running(pid)


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
