"""The attention library (``plugins/src/attention``), bound: its structs, its functions, and what they take."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from pt_trtllm import env, native
from pt_trtllm.errors import EngineError

LIBRARY_NAME = "libpt_attention.so"

_ABI_VERSION = 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_DTYPES = DTYPES | {torch.int8: 3}
NORMS = {None: 0, "before_rope": 1, "after_rope": 2}
ROPES = {None: 0, "interleaved": 1, "half": 2}


class Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "num_tracks", "num_kv_heads", "head_dim", "block_tokens")),
        ("dtype", ctypes.c_int32),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("first_token", "num_tokens", "past", "block_table")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_sequences", "max_blocks", "total_tokens")),
    ]


class Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("track_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class Prologue(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query_weight", "key_weight", "cos", "sin", "positions")),
        *((name, ctypes.c_int64) for name in ("query_weight_track_stride", "key_weight_track_stride", "num_rows")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "weight_dtype", "norm", "rope")),
        ("eps", ctypes.c_float),
    ]


def isa() -> str:
    """Instruction set of the kernels: baseline, avx2 or avx512 (`PT_KERNELS_ISA` overrides the choice)."""
    library = load_library()
    name: bytes | None = library.pt_attention_isa()
    if name is None:
        raise EngineError(library.pt_attention_last_error().decode(errors="replace"))
    return name.decode()


def library_path() -> Path:
    """Where this library is. Raises with how to build it."""
    return native.library_path(LIBRARY_NAME, env.ATTENTION_LIBRARY, EngineError)


@functools.cache
def load_library() -> ctypes.CDLL:
    pointer, text, number, long, real = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float,
    )  # fmt: skip
    signatures: native.Signatures = {
        "pt_attention_last_error": (text, []),
        "pt_attention_abi_version": (number, []),
        "pt_attention_isa": (text, []),
        "pt_attention_write": (number, [pointer] * 4 + [number]),
        "pt_attention_attend": (number, [pointer] * 3 + [number, long, real, pointer, number]),
        "pt_rms_norm": (number, [pointer] * 2 + [number] * 3 + [pointer, number, long, real, number]),
        "pt_qk_norm_rope": (number, [pointer, number, number, pointer]),
        "pt_swiglu": (number, [pointer] * 2 + [number] * 4),
    }
    return native.load_library(library_path(), signatures, ("pt_attention_abi_version", _ABI_VERSION), EngineError)


def check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise EngineError(library.pt_attention_last_error().decode(errors="replace"))


def rows_of(operation: str, name: str, x: torch.Tensor) -> Rows:
    """[tracks, tokens, features] whose features are contiguous."""
    dtype = DTYPES.get(x.dtype)
    if dtype is None or x.dim() != 3 or not x.is_cpu or (x.shape[2] > 1 and x.stride(2) != 1):
        raise EngineError(
            f"{operation}: {name} is {found(x)}, expected float32, bfloat16 or float16 [tracks, tokens, features] on"
            " cpu, features contiguous"
        )
    return Rows(x.data_ptr(), x.stride(0), x.stride(1), dtype)


def heads_of(operation: str, name: str, x: torch.Tensor, shape: tuple[int, ...]) -> Rows:
    """[tracks, tokens, heads, head_dim] whose heads lie side by side."""
    dtype = DTYPES.get(x.dtype)
    if (
        dtype is None
        or tuple(x.shape) != shape
        or not x.is_cpu
        or x.stride(3) != 1
        or (shape[2] > 1 and x.stride(2) != shape[3])
    ):
        raise EngineError(
            f"{operation}: {name} is {found(x)}, expected float32, bfloat16 or float16 {list(shape)} on cpu, heads and"
            " features contiguous"
        )
    return Rows(x.data_ptr(), x.stride(0), x.stride(1), dtype)


def weight_of(
    operation: str, weight: torch.Tensor | None, dtype: torch.dtype, tracks: int, width: int
) -> tuple[int | None, int, int]:
    """Pointer, type and stride between tracks of None, [width] or [tracks, width]."""
    if weight is None:
        return None, DTYPES[dtype], 0
    shared = weight.dim() == 1
    if (
        weight.dtype not in (dtype, torch.float32)
        or tuple(weight.shape) not in ((width,), (tracks, width))
        or not weight.is_contiguous()
        or not weight.is_cpu
    ):
        raise EngineError(
            f"{operation}: weight is {found(weight)}, expected {name_of(dtype)} or float32 [{tracks}, {width}] or"
            f" [{width}], contiguous on cpu"
        )
    return weight.data_ptr(), DTYPES[weight.dtype], 0 if shared else width


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def found(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{name_of(tensor.dtype)} {list(tensor.shape)} strides {list(tensor.stride())} on {tensor.device}"
