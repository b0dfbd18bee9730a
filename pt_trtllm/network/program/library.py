"""The program library (``plugins/src/program``), bound: its structs and its one function."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from pt_trtllm import env, native
from pt_trtllm.errors import EngineError
from pt_trtllm.network import attention_library, native_linear
from pt_trtllm.network.attention_library import Prologue, Rows

LIBRARY_NAME = "libpt_program.so"
KINDS = ("embed", "linear", "rms_norm", "add", "qk_norm_rope", "attend")
"""In the order of `pt_program_kind`."""

_ABI_VERSION = 2


class EmbedWork(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("row_bytes", ctypes.c_size_t),
    )


class LinearWork(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "up", "x", "bias", "y")),
        ("dtype", ctypes.c_int32),
    )


class RmsNormWork(ctypes.Structure):
    _fields_ = (
        ("x", Rows),
        ("out", Rows),
        ("weight", ctypes.c_void_p),
        ("weight_track_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_tracks", "width", "weight_dtype", "pre_scale")),
        ("eps", ctypes.c_float),
    )


class AddWork(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("x", "y", "out")),
        ("num_tracks", ctypes.c_int32),
        ("width", ctypes.c_int32),
    )


class QkNormRopeWork(ctypes.Structure):
    _fields_ = (("qkv", Rows), ("work", Prologue), ("num_tracks", ctypes.c_int32))


class AttendWork(ctypes.Structure):
    _fields_ = (
        ("cache", ctypes.c_void_p),
        *((name, Rows) for name in ("query", "key", "value", "out")),
        ("window", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("batch", ctypes.c_int32),
    )


Work = EmbedWork | LinearWork | RmsNormWork | AddWork | QkNormRopeWork | AttendWork
KIND_OF = {
    kind: number
    for number, kind in enumerate((EmbedWork, LinearWork, RmsNormWork, AddWork, QkNormRopeWork, AttendWork))
}


class OpEntry(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("work", ctypes.c_void_p))


class Step(ctypes.Structure):
    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("batches", ctypes.c_void_p),
        ("num_batches", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


def library_path() -> Path:
    """Where this library is. Raises with how to build it."""
    return native.library_path(LIBRARY_NAME, env.PROGRAM_LIBRARY, EngineError)


@functools.cache
def load_library() -> ctypes.CDLL:
    # The libraries it calls: loaded first, so that it uses these copies, wherever they are.
    attention_library.load_library()
    native_linear.load_library()
    pointer, number = ctypes.c_void_p, ctypes.c_int
    signatures: native.Signatures = {
        "pt_program_last_error": (ctypes.c_char_p, []),
        "pt_program_abi_version": (number, []),
        "pt_program_run": (number, [pointer, ctypes.c_size_t, pointer, pointer]),
    }
    return native.load_library(library_path(), signatures, ("pt_program_abi_version", _ABI_VERSION), EngineError)
