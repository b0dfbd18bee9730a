"""Kernels that products reach through programs only (`network/program`), one by one: for tests."""

from __future__ import annotations

import ctypes

import torch

from pt_trtllm.errors import EngineError
from pt_trtllm.network import attention_library as lib
from pt_trtllm.network import native_linear
from pt_trtllm.network.native_linear import NativeLinear


def qk_norm_rope_(
    qkv: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: str | None = None,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    rope: str | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises and rotates queries and keys in place on qkv [tracks, tokens, (heads + 2 * kv_heads) * head_dim].

    `norm`: None, "before_rope" or "after_rope", with weights None, [head_dim] or [tracks, head_dim]. `rope`: None,
    "interleaved" or "half", with cos and sin float32 [rows, head_dim / 2]: row `positions[i]` for token i, or row i.
    """
    rows = lib.rows_of("qk_norm_rope", "qkv", qkv)
    tracks, tokens, width = qkv.shape
    if width != (num_heads + 2 * num_kv_heads) * head_dim:
        raise EngineError(
            f"qk_norm_rope: qkv is {lib.found(qkv)}, expected {num_heads} + 2 * {num_kv_heads} heads of {head_dim}"
        )
    if norm not in lib.NORMS or rope not in lib.ROPES:
        raise EngineError(
            f"qk_norm_rope: norm is {norm!r} and rope {rope!r}, expected {[*lib.NORMS]} and {[*lib.ROPES]}"
        )
    query = lib.weight_of("qk_norm_rope", query_weight, qkv.dtype, tracks, head_dim)
    key = lib.weight_of("qk_norm_rope", key_weight, qkv.dtype, tracks, head_dim)
    if query_weight is not None and key_weight is not None and query[1] != key[1]:
        raise EngineError("qk_norm_rope: the weights of query and key have two types, expected one")
    num_rows = 0
    if rope is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            if table is None or table.dtype != torch.float32 or not table.is_contiguous() or not table.is_cpu:
                raise EngineError(f"qk_norm_rope: {name} is {lib.found(table)}, expected float32, contiguous on cpu")
            if table.dim() != 2 or table.shape[1] != head_dim // 2 or (cos is not None and table.shape != cos.shape):
                raise EngineError(f"qk_norm_rope: {name} is {lib.found(table)}, expected [rows, {head_dim // 2}]")
            num_rows = table.shape[0]
        if positions is not None and (
            positions.dtype != torch.int64 or tuple(positions.shape) != (tokens,) or not positions.is_contiguous()
        ):
            raise EngineError(f"qk_norm_rope: positions is {lib.found(positions)}, expected int64 [{tokens}]")
    work = lib.Prologue(
        query[0], key[0], *(None if table is None else table.data_ptr() for table in (cos, sin, positions)), query[2],
        key[2], num_rows, num_heads, num_kv_heads, head_dim, key[1] if query_weight is None else query[1],
        lib.NORMS[norm], lib.ROPES[rope], eps,
    )  # fmt: skip
    library = lib.load_library()
    lib.check(library, library.pt_qk_norm_rope(ctypes.byref(rows), tracks, tokens, ctypes.byref(work)))
    return qkv


def linear_swiglu(gate: NativeLinear, up: NativeLinear, x: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate^T) * (x @ up^T) of dense x [tracks, tokens, in], in one pass over both weights."""
    library, y = native_linear.load_library(), x.new_empty((*x.shape[:2], gate.out_features))
    for track, (gate_weight, up_weight) in enumerate(zip(gate.pointers, up.pointers, strict=True)):
        at_x, at_y = x[track].data_ptr(), y[track].data_ptr()
        if library.pt_linear_swiglu(gate_weight, up_weight, at_x, at_y, x.shape[1], lib.DTYPES[x.dtype], 1):
            raise EngineError(library.pt_linear_last_error().decode())
    return y
