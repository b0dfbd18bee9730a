"""Matrix products of the PyTorch lowering: float weights, and packed int8 / int4 ones.

All take [tracks, tokens, in] and give [tracks, tokens, out], each track with its own weight.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn import functional

MIN_ROWS_TO_UPCAST = 48
"""From this many tokens on, widening bf16 weights pays on a CPU without bf16 arithmetic (measured, AVX2)."""
INT4_INNER_TILES = 1
"""The CPU kernel ignores it; the operator's signature wants one."""


class Linear(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@functools.cache
def has_fast_half_gemm(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the device multiplies this 16-bit type natively."""
    if device_type != "cpu":
        return True
    features = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    return any(features.get(name, False) for name in names)


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[tracks, tokens, in] x [tracks, out, in] as one batched product."""
    upcast = (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] >= MIN_ROWS_TO_UPCAST
        and not has_fast_half_gemm(x.dtype, x.device.type)
    )
    if upcast:
        return torch.stack(
            [functional.linear(a.float(), w.float()).to(x.dtype) for a, w in zip(x, weight, strict=True)]
        )
    if x.shape[0] == 1:
        return functional.linear(x[0], weight[0])[None]
    return torch.bmm(x, weight.transpose(1, 2))


class FloatLinear:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.weight)


class Int8Linear:
    """weight [tracks, out, in] int8, scale [tracks, out] in the activations' type."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight, self.scale = weight, scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                torch.ops.aten._weight_int8pack_mm(a.contiguous(), w, s)
                for a, w, s in zip(x, self.weight, self.scale, strict=True)
            ]
        )


class Int4Linear:
    """packed [tracks, out, in / 2] uint8 in the kernel's own order, scale_zero [tracks, in / group, out, 2]."""

    def __init__(self, packed: torch.Tensor, scale_zero: torch.Tensor, group_size: int) -> None:
        self.packed, self.scale_zero, self.group_size = packed, scale_zero, group_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                torch.ops.aten._weight_int4pack_mm_for_cpu(a.contiguous(), p, self.group_size, sz)
                for a, p, sz in zip(x, self.packed, self.scale_zero, strict=True)
            ]
        )


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., out, in] (0..15) into the order the CPU kernel of this machine reads."""
    flat = codes.reshape(-1, *codes.shape[-2:])
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.to(torch.int32), INT4_INNER_TILES) for matrix in flat
    ]
    return torch.stack(packed).view(*codes.shape[:-2], *packed[0].shape)
