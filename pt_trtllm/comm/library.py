"""The track-fusion library (``plugins/``): where it is, and its functions."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from pt_trtllm import env, native
from pt_trtllm.errors import CommunicationError

LIBRARY_NAME = "libpt_track_fusion.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""pt_dtype"""
_ABI_VERSION = 1


def library_path() -> Path:
    """Where this library is. Raises with how to build it."""
    return native.library_path(LIBRARY_NAME, env.PLUGIN_LIBRARY, CommunicationError)


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, with its functions declared; once per process."""
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    size, real, real32, group_out = ctypes.c_size_t, ctypes.c_double, ctypes.c_float, ctypes.POINTER(ctypes.c_void_p)
    fuse = [pointer] * 4 + [size, size, number, number, pointer, size, number, real32, pointer]
    signatures: native.Signatures = {
        "pt_last_error": (text, []),
        "pt_track_fusion_abi_version": (number, []),
        "pt_track_fusion_create": (number, [number, size, real, group_out]),
        "pt_track_fusion_attach": (number, [text, number, number, real, group_out]),
        "pt_track_fusion_name": (text, [pointer]),
        "pt_track_fusion_isa": (text, [pointer]),
        "pt_track_fusion_unlink": (number, [pointer, real]),
        "pt_track_fusion_fuse": (number, [*fuse, real]),
        "pt_track_fusion_fuse_coded": (number, [*fuse, number, number, number, real]),
        "pt_track_fusion_all_reduce": (number, [pointer, pointer, pointer, size, number, real]),
        "pt_track_fusion_broadcast": (number, [pointer, pointer, size, number, real]),
        "pt_track_fusion_gather": (number, [pointer, pointer, size, size, pointer, number, real]),
        "pt_track_fusion_barrier": (number, [pointer, real]),
        "pt_track_fusion_poll": (number, [pointer, number, real]),
        "pt_track_fusion_abort": (number, [pointer, text]),
        "pt_track_fusion_close": (number, [pointer]),
        "pt_codec_encoded_bytes": (size, [number, size, size]),
        "pt_codec_encode": (number, [number, pointer, pointer, number, size, size, pointer]),
        "pt_codec_decode": (number, [number, pointer, size, size, pointer]),
    }
    return native.load_library(
        library_path(), signatures, ("pt_track_fusion_abi_version", _ABI_VERSION), CommunicationError
    )


def check(library: ctypes.CDLL, status: int) -> None:
    """Raises what the library says about a call that failed."""
    if status:
        raise CommunicationError(library.pt_last_error().decode(errors="replace"))
