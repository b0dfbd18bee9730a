"""Matrix products of the PyTorch lowering: float, int8 and int4 weights, for a few rows or many.

All take [tracks, tokens, in] and give [tracks, tokens, out], each track with its own weight. For a few dozen rows the
kernel library streams the weights at the speed of memory (`plugins/src/linear`); it also wins for many rows where the
processor does not multiply the weights' type itself. Otherwise a GEMM of PyTorch's takes over.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn import functional

from pt_trtllm.network.native_linear import NativeLinear, copy_to_huge_pages, supports

GEMM_MIN_ROWS = 64
"""From here on a GEMM is ahead of streaming, if the processor has one for the type."""
HUGE_PAGE_BYTES = 2 << 20
TILE_OUTPUTS = 2048
"""Outputs of a quantised weight that are widened at a time, so that no second copy of it is needed."""


class Linear(Protocol):
    @property
    def out_features(self) -> int: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def make_linear(weight: torch.Tensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None) -> Linear:
    """weight [tracks, out, in] (int4: [tracks, out, in / 2]) with scale [tracks, out] or scale and zero per group."""
    num_inputs = weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)
    if supports(num_inputs):
        # Mapped files get 4 KiB pages; streaming through 2 MiB ones is a sixth faster here. Small weights stay mapped.
        return StreamedLinear(copy_to_huge_pages(weight) if weight.nbytes >= HUGE_PAGE_BYTES else weight, scale, zero)
    if scale is not None:
        return Int8Linear(weight, scale)
    return FloatLinear(weight)


@functools.cache
def has_fast_gemm(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies the type natively; the others are emulated, many times slower."""
    features = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        return bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    if dtype == torch.float16:
        return bool(features.get("amx_fp16") or features.get("avx512_fp16"))
    return True


class StreamedLinear:
    """The kernel library for few rows, a GEMM for many."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> None:
        self.native = NativeLinear(weight, scale, zero)
        self._is_float = scale is None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] < GEMM_MIN_ROWS or not has_fast_gemm(x.dtype):
            return self.native(x)
        if self._is_float:
            return matmul(x, self.native.weight)
        return torch.stack([self._widened(rows, track) for track, rows in enumerate(x)])

    @property
    def out_features(self) -> int:
        return self.native.out_features

    def _widened(self, rows: torch.Tensor, track: int) -> torch.Tensor:
        num_outputs = self.native.out_features
        return torch.cat(
            [
                functional.linear(
                    rows, self.native.dequantize(track, first, min(first + TILE_OUTPUTS, num_outputs), rows.dtype)
                )
                for first in range(0, num_outputs, TILE_OUTPUTS)
            ],
            dim=1,
        )


class FloatLinear:
    """Weights whose number of inputs the kernel library does not take."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.out_features = weight, weight.shape[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.weight)


class Int8Linear:
    """The same for int8: weight [tracks, out, in], scale [tracks, out] in the activations' type."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight, self.scale, self.out_features = weight, scale, weight.shape[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                torch.ops.aten._weight_int8pack_mm(a.contiguous(), w, s)
                for a, w, s in zip(x, self.weight, self.scale, strict=True)
            ]
        )


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[tracks, tokens, in] x [tracks, out, in] as one batched product."""
    if x.shape[0] == 1:
        return functional.linear(x[0], weight[0])[None]
    return torch.bmm(x, weight.transpose(1, 2))
