"""The small kernels around attention that the PyTorch lowering calls: RMSNorm and SwiGLU."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes

import torch

from pt_trtllm.errors import EngineError
from pt_trtllm.network import attention_library as lib


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    pre_scale: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the last axis of x [tracks, tokens, width] with weight [tracks, width] or [width], in float32.

    x may be a view that repeats one track. `pre_scale` multiplies by the weight before, not after. `out` may be x.
    """
    rows = lib.rows_of("rms_norm", "x", x)
    tracks, tokens, width = x.shape
    if out is None:
        out = x.new_empty(x.shape)
    elif out.shape != x.shape or out.dtype != x.dtype:
        raise EngineError(f"rms_norm: out is {lib.found(out)}, expected {lib.name_of(x.dtype)} {list(x.shape)}")
    target = lib.rows_of("rms_norm", "out", out)
    pointer, dtype, stride = lib.weight_of("rms_norm", weight, x.dtype, tracks, width)
    library = lib.load_library()
    status = library.pt_rms_norm(
        ctypes.byref(rows), ctypes.byref(target), tracks, tokens, width, pointer, dtype, stride, eps, pre_scale
    )
    if status:
        lib.check(library, status)
    return out


def swiglu(x: torch.Tensor, *, gate_first: bool) -> torch.Tensor:
    """silu(gate) * up of x [tracks, tokens, 2 * width] whose halves are gate and up, or up and gate."""
    rows = lib.rows_of("swiglu", "x", x)
    tracks, tokens, width = x.shape
    if width % 2:
        raise EngineError(f"swiglu: x is {lib.found(x)}, expected an even number of features")
    out = x.new_empty((tracks, tokens, width // 2))
    target = lib.rows_of("swiglu", "out", out)
    library = lib.load_library()
    status = library.pt_swiglu(ctypes.byref(rows), ctypes.byref(target), tracks, tokens, width // 2, gate_first)
    if status:
        lib.check(library, status)
    return out
