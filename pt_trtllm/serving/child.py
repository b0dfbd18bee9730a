"""How the server's processes are confined, between fork and exec: they end with the launcher and share with nobody."""

from __future__ import annotations

import ctypes
import platform
import signal
from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SECCOMP_MODE_FILTER, ALLOW, RETURN_SUCCESS = 2, 0x7FFF0000, 0x00050000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
SYSCALL_NUMBER, ARCHITECTURE = 0, 4
"""Where they stand in what the kernel shows a filter."""
FCHMOD = {"x86_64": (0xC000003E, 91), "aarch64": (0xC00000B7, 52)}
"""(architecture, system call) as the kernel counts them."""
PRIVATE_UMASK = 0o077
LIBC = ctypes.CDLL(None, use_errno=True)


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def adopt_orphans() -> None:
    """Whatever loses its parent below this process comes to it, which ends it."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def confine_server() -> None:
    """Triton's Python backend makes its shared memory readable for everybody: Boost calls fchmod behind shm_open, so
    that umask alone does nothing. Here fchmod succeeds without effect, and files keep the mode that umask gives them.
    """
    end_with_parent()
    if _FILTER is None:
        return
    program = ctypes.byref(_FILTER)
    if LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):  # needs a privilege, or to give up gaining any
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
            raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def _filter() -> Any:
    if platform.machine() not in FCHMOD:
        return None
    architecture, fchmod = FCHMOD[platform.machine()]
    steps = (
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 0, 3, architecture),
        (LOAD, 0, 0, SYSCALL_NUMBER),
        (JUMP_IF_EQUAL, 0, 1, fchmod),
        (RETURN, 0, 0, RETURN_SUCCESS),
        (RETURN, 0, 0, ALLOW),
    )
    return _Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))


_FILTER = _filter()
"""Made before the fork, where little may be done."""
