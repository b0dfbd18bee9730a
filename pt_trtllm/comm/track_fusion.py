"""The track-fusion library (``plugins/``), bound: collectives of ranks on one host over shared memory."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import os
import threading
import weakref
from types import TracebackType
from typing import Any

import torch

from pt_trtllm.comm import torch_operator
from pt_trtllm.comm.coding import NO_CODING, Coding
from pt_trtllm.comm.library import DTYPES, check, library_path, load_library
from pt_trtllm.errors import CommunicationError

__all__ = ["ShmGroup", "library_path"]

DEFAULT_CAPACITY_BYTES = 256 * 1024
DEFAULT_TIMEOUT_S = 60.0
"""Generous: the first call of a rank waits while the others still load their weights."""

_NOT_READY = 9
_POLL_S = 1.0
_REDUCTIONS = {"mean": 0, "sum": 1}


class ShmGroup:
    """One rank's membership in a group of ranks on one host.

    Rank 0 calls `create`, sends `name` to the others by its own means, they `attach`. All ranks then call the same
    collectives in the same order with the same sizes. Results are bit-identical on all ranks. A group serves one thread
    at a time; only `abort` may come from another one. After a failure every later call fails with the first reason.

    `timeout_s` limits one wait without progress: None takes the group's default, 0 waits for ever but still notices a
    dead peer or an abort. Everything raises `CommunicationError`.
    """

    rank: int
    size: int
    name: str
    """What the other ranks attach to. The name is gone from the system once all have attached."""
    isa: str
    """Instruction set of the arithmetic: baseline, avx2 or avx512."""

    def __init__(self, pointer: ctypes.c_void_p, rank: int, size: int) -> None:
        self._library = load_library()
        self._pointer: ctypes.c_void_p | None = pointer
        self._life_lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_at_exit, self._library, pointer, os.getpid())
        self.rank = rank
        self.size = size
        self.name = self._library.pt_track_fusion_name(pointer).decode()
        self.isa = self._library.pt_track_fusion_isa(pointer).decode()

    @classmethod
    def create(
        cls,
        *,
        size: int,
        capacity_bytes: int = DEFAULT_CAPACITY_BYTES,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> ShmGroup:
        """Makes a group and joins it as rank 0. Needs about 2 * size * capacity_bytes of /dev/shm."""
        library = load_library()
        pointer = ctypes.c_void_p()
        check(library, library.pt_track_fusion_create(size, capacity_bytes, timeout_s, ctypes.byref(pointer)))
        return cls(pointer, 0, size)

    @classmethod
    def attach(cls, name: str, *, rank: int, size: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> ShmGroup:
        """Joins the group that rank 0 created under `name`."""
        library = load_library()
        pointer = ctypes.c_void_p()
        status = library.pt_track_fusion_attach(name.encode(), rank, size, timeout_s, ctypes.byref(pointer))
        check(library, status)
        return cls(pointer, rank, size)

    def register(self, name: str) -> None:
        """Makes the group known to the torch operator `pt_trtllm::track_fusion` by `name`, until it is closed."""
        torch_operator.register(name, self)

    def unlink(self, timeout_s: float | None = None) -> None:
        """Waits until every rank has attached; from then on nothing of the group is left in /dev/shm."""
        self._finish(self._library.pt_track_fusion_unlink(self._pointer, _limit(timeout_s)))

    def fuse(
        self,
        x: torch.Tensor,
        *,
        op: str = "mean",
        residual: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        eps: float = 1e-5,
        coding: Coding = NO_CODING,
        timeout_s: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h = mean or sum over ranks of x [..., hidden] (+ residual), and its RMSNorm when `gamma` is given.

        gamma [hidden] gives normed like x, gamma [num_gammas, hidden] gives [num_gammas, ..., hidden]; its type is x's
        or float32. The residual is this rank's own. x may have no rows: the rank still takes part.

        With a codec, what travels is encoded (plugins/include/pt/codecs.h has the rules). `coding.delta` needs the mean
        and a residual, the same on all ranks: x - residual travels, and h is the mean of x.
        """
        dtype = DTYPES.get(x.dtype)
        if dtype is None or not x.is_contiguous() or not x.is_cpu or x.dim() == 0:
            raise _unsuitable("fuse", "x", x)
        reduction = _REDUCTIONS.get(op)
        if reduction is None:
            raise CommunicationError(f"fuse: op is {op!r}, expected 'mean' or 'sum'")
        hidden = x.shape[-1]
        residual_pointer = None
        if residual is not None:
            if (
                residual.dtype != x.dtype
                or residual.shape != x.shape
                or not residual.is_contiguous()
                or not residual.is_cpu
            ):
                raise _unlike("fuse", "residual", residual, x.dtype, list(x.shape))
            residual_pointer = residual.data_ptr()
        h = torch.empty_like(x)
        normed = gamma_pointer = norm_pointer = None
        num_gammas, gamma_dtype = 0, dtype
        if gamma is not None:
            gamma_dtype = dtype if gamma.dtype == x.dtype else 0
            if DTYPES.get(gamma.dtype) != gamma_dtype or not 1 <= gamma.dim() <= 2 or gamma.shape[-1] != hidden:
                raise _unlike("fuse", "gamma", gamma, x.dtype, ["num_gammas", hidden])
            if not gamma.is_contiguous() or not gamma.is_cpu:
                raise _unsuitable("fuse", "gamma", gamma)
            if gamma.dim() == 1:
                num_gammas, normed = 1, torch.empty_like(x)
            else:
                num_gammas = gamma.shape[0]
                normed = x.new_empty((num_gammas, *x.shape))
            if num_gammas:
                gamma_pointer, norm_pointer = gamma.data_ptr(), normed.data_ptr()
        arguments = (
            self._pointer,
            x.data_ptr(),
            residual_pointer,
            h.data_ptr(),
            x.numel() // hidden if hidden else 0,
            hidden,
            dtype,
            reduction,
            gamma_pointer,
            num_gammas,
            gamma_dtype,
            eps,
            norm_pointer,
        )
        limit_s = -1.0 if timeout_s is None else timeout_s
        if coding.codec == "none":
            status = self._library.pt_track_fusion_fuse(*arguments, limit_s)
        else:
            numbers = (coding.codec_number, coding.delta, coding.algorithm_number)
            status = self._library.pt_track_fusion_fuse_coded(*arguments, *numbers, limit_s)
        if status:
            self._finish(status)
        return h, normed

    def all_reduce(
        self, x: torch.Tensor, *, out: torch.Tensor | None = None, timeout_s: float | None = None
    ) -> torch.Tensor:
        """Sum over ranks, accumulated in float32, rounded once to x's type. `out` may be x; default: a new tensor."""
        dtype = DTYPES.get(x.dtype)
        if dtype is None or not x.is_contiguous() or not x.is_cpu:
            raise _unsuitable("all_reduce", "x", x)
        if out is None:
            out = torch.empty_like(x)
        elif out.dtype != x.dtype or out.shape != x.shape or not out.is_contiguous() or not out.is_cpu:
            raise _unlike("all_reduce", "out", out, x.dtype, list(x.shape))
        status = self._library.pt_track_fusion_all_reduce(
            self._pointer, x.data_ptr(), out.data_ptr(), x.numel(), dtype, -1.0 if timeout_s is None else timeout_s
        )
        if status:
            self._finish(status)
        return out

    def broadcast(
        self, buffer: torch.Tensor | bytearray | memoryview | bytes, root: int = 0, timeout_s: float | None = None
    ) -> None:
        """Fills `buffer` on every rank with root's bytes; all ranks pass the same number of bytes.

        Root may pass read-only `bytes`. With ``timeout_s=0`` a receiver sleeps until root calls, and Python's signal
        handlers run in the meantime.
        """
        address, num_bytes = _writable(buffer, self.rank == root)
        if timeout_s == 0 and self.rank != root:
            while (status := self._library.pt_track_fusion_poll(self._pointer, root, _POLL_S)) == _NOT_READY:
                pass
            self._finish(status)
        status = self._library.pt_track_fusion_broadcast(self._pointer, address, num_bytes, root, _limit(timeout_s))
        if status:
            self._finish(status)

    def gather(self, x: torch.Tensor, root: int = 0, timeout_s: float | None = None) -> torch.Tensor | None:
        """x [rows, columns] of every rank side by side: [rows, size * columns] at root, None elsewhere. Any type."""
        if x.dim() != 2 or not x.is_contiguous() or not x.is_cpu:
            raise _unsuitable("gather", "x", x, "two dimensions")
        rows, columns = x.shape
        out = x.new_empty((rows, columns * self.size)) if self.rank == root else None
        status = self._library.pt_track_fusion_gather(
            self._pointer,
            x.data_ptr(),
            rows,
            columns * x.element_size(),
            None if out is None else out.data_ptr(),
            root,
            -1.0 if timeout_s is None else timeout_s,
        )
        if status:
            self._finish(status)
        return out

    def barrier(self, timeout_s: float | None = None) -> None:
        """Returns when every rank has called it."""
        self._finish(self._library.pt_track_fusion_barrier(self._pointer, _limit(timeout_s)))

    def abort(self, reason: str) -> None:
        """Ends every rank's waits, now and later, with `reason`. From any thread; without effect after `close`."""
        with self._life_lock:
            if self._pointer is not None:
                self._library.pt_track_fusion_abort(self._pointer, reason.encode())

    def close(self) -> None:
        """Leaves the group; a second call does nothing. Peers that still need this rank are told that it left."""
        with self._life_lock:
            if self._pointer is None:
                return
            torch_operator.forget(self)
            self._finish(self._library.pt_track_fusion_close(self._pointer))
            self._finalizer.detach()
            self._pointer = None

    def __enter__(self) -> ShmGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def _finish(self, status: int) -> None:
        check(self._library, status)


def _close_at_exit(library: ctypes.CDLL, pointer: ctypes.c_void_p, pid: int) -> None:
    # A forked child inherits the object but is not the rank.
    if os.getpid() == pid:
        library.pt_track_fusion_close(pointer)


def _limit(timeout_s: float | None) -> float:
    return -1.0 if timeout_s is None else timeout_s


def _writable(
    buffer: torch.Tensor | bytearray | memoryview | bytes, read_only_is_fine: bool
) -> tuple[int | bytes | None, int]:
    """Address (or the bytes object, which ctypes passes by address) and size."""
    if isinstance(buffer, torch.Tensor):
        if not buffer.is_contiguous() or not buffer.is_cpu:
            raise _unsuitable("broadcast", "buffer", buffer)
        return buffer.data_ptr(), buffer.nbytes
    if isinstance(buffer, bytes) and read_only_is_fine:
        return buffer, len(buffer)
    view = memoryview(buffer)
    if view.readonly or not view.c_contiguous:
        raise CommunicationError(
            f"broadcast: the buffer is a {'read-only' if view.readonly else 'strided'} {type(buffer).__name__},"
            " expected a writable contiguous one"
        )
    return (ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else None), view.nbytes


def found(tensor: torch.Tensor) -> str:
    kind = "contiguous" if tensor.is_contiguous() else "strided"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {kind} on {tensor.device}"


def _unsuitable(operation: str, name: str, tensor: torch.Tensor, shape: str = "at least one dimension") -> Exception:
    types = "any type" if operation in ("gather", "broadcast") else "float32, bfloat16 or float16"
    return CommunicationError(f"{operation}: {name} is {found(tensor)}, expected {types}, {shape}, contiguous on cpu")


def _unlike(operation: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: list[Any]) -> Exception:
    expected = str(dtype).removeprefix("torch.")
    return CommunicationError(
        f"{operation}: {name} is {found(tensor)}, expected {expected} {shape}, contiguous on cpu"
        + (" (or float32)" if name == "gamma" else "")
    )
