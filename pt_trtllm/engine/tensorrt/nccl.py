"""The NCCL communicator that an engine's collectives run on: one per process, made by all ranks at once."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from pt_trtllm.comm.base import Communicator
from pt_trtllm.errors import CommunicationError

UNIQUE_ID_BYTES = 128


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class NcclCommunicator:
    """A world-wide `ncclComm_t`. TensorRT splits it for the groups of its collectives."""

    def __init__(self, comm: Communicator) -> None:
        """Called by every rank; returns when all have joined. The current CUDA device is the rank's."""
        self._library, self._handle = _load(), ctypes.c_void_p()
        unique_id = _UniqueId()
        if comm.rank == 0:
            self._check(self._library.ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId")
        told = comm.broadcast(bytes(unique_id) if comm.rank == 0 else None)
        unique_id = _UniqueId.from_buffer_copy(told)
        code = self._library.ncclCommInitRank(ctypes.byref(self._handle), comm.world_size, unique_id, comm.rank)
        self._check(code, f"ncclCommInitRank of rank {comm.rank} of {comm.world_size}")

    def capsule(self) -> Any:
        """The handle as `IExecutionContext.set_communicator` takes it."""
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(self._handle, None, None)

    def close(self) -> None:
        if self._handle:
            self._library.ncclCommDestroy(self._handle)
            self._handle = ctypes.c_void_p()

    def _check(self, code: int, call: str) -> None:
        if code:
            reason = self._library.ncclGetErrorString(code).decode(errors="replace")
            raise CommunicationError(f"{call} failed: {reason}; NCCL_DEBUG=INFO in the environment tells more")


def _load() -> ctypes.CDLL:
    """The library that PyTorch brought, or the system's: a process must not use two."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) / "nccl" / "lib" for place in (spec.submodule_search_locations or [])] if spec else []
    for path in (*(str(folder / "libnccl.so.2") for folder in folders), "libnccl.so.2"):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.ncclGetErrorString.restype = ctypes.c_char_p
        library.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int]
        library.ncclCommDestroy.argtypes = [ctypes.c_void_p]
        return library
    raise CommunicationError(
        "engines of several ranks need NCCL: libnccl.so.2 was not found; pip install nvidia-nccl-cu13"
    )
