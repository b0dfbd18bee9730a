"""``pt/cuda_fusion.h`` as ctypes: structures, functions, and the library itself. Imports nothing of CUDA."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from pt_trtllm import env, native
from pt_trtllm.errors import CommunicationError

LIBRARY_NAME = "libpt_cuda_fusion.so"
ABI_VERSION = 3

PROVIDERS = {"host_threads": 0, "same_process": 1, "cuda_ipc": 2, "vmm": 3}
ALGORITHMS = {"encode_once": -2, "auto": -1, "one_shot": 0, "pull": 1, "two_shot": 2, "nccl": 3, "nvls": 4}
REDUCTIONS = {"mean": 0, "sum": 1}

AllGather = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Config(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("size", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("provider", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("num_blocks", ctypes.c_uint32),
        ("one_shot_bytes", ctypes.c_uint64),
        ("pull_bytes", ctypes.c_uint64),
        ("two_shot_bytes", ctypes.c_uint64),
        ("staging_bytes", ctypes.c_uint64),
        ("timeout_s", ctypes.c_double),
        ("use_nccl", ctypes.c_int32),
        ("strict_order", ctypes.c_int32),
        ("use_nvls", ctypes.c_int32),
    )


class Arguments(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("reduction", ctypes.c_int32),
        ("algorithm", ctypes.c_int32),
        ("tokens", ctypes.c_uint64),
        ("hidden", ctypes.c_uint64),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("norm_out", ctypes.c_void_p),
        ("num_gammas", ctypes.c_uint32),
        ("gamma_dtype", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("codec", ctypes.c_int32),
        ("delta", ctypes.c_int32),
    )


def library_path() -> Path:
    """Where this library is. Raises with how to build it."""
    return native.library_path(LIBRARY_NAME, env.CUDA_FUSION_LIBRARY, CommunicationError)


@functools.cache
def load_library() -> ctypes.CDLL:
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    arguments = ctypes.POINTER(Arguments)
    signatures: native.Signatures = {
        "pt_cuda_fusion_last_error": (text, []),
        "pt_cuda_fusion_abi_version": (number, []),
        "pt_cuda_fusion_has_cuda": (number, []),
        "pt_cuda_fusion_open": (number, [ctypes.POINTER(Config), AllGather, pointer, ctypes.POINTER(pointer)]),
        "pt_cuda_fusion_fuse": (number, [pointer, arguments, pointer]),
        "pt_cuda_fusion_status": (number, [pointer]),
        "pt_cuda_fusion_algorithm_for": (number, [pointer, arguments]),
        "pt_cuda_fusion_abort": (number, [pointer]),
        "pt_cuda_fusion_close": (number, [pointer]),
        "pt_cuda_fusion_register": (number, [text, pointer]),
        "pt_cuda_fusion_find": (pointer, [text]),
        "pt_cuda_fusion_size": (number, [pointer]),
    }
    return native.load_library(
        library_path(), signatures, ("pt_cuda_fusion_abi_version", ABI_VERSION), CommunicationError
    )


def check(status: int) -> None:
    if status:
        raise CommunicationError(load_library().pt_cuda_fusion_last_error().decode(errors="replace"))
