"""Quantisation of weights, row by row, so that it can be applied to blocks of rows as they stream by.

int8_wo   one scale per output row:            w = q * scale
int4_wo   scale and zero per group of inputs:  w = (q - 8) * scale + zero, q in 0..15, two per byte (even column low)
fp8_wo    one scale per output row:            w = q * scale, q a float of 8 bits (e4m3), scale float32
fp8       the same weights; GPU engines round each token's inputs of a product to e4m3, too, with a scale of its own
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pt_trtllm.checkpoint.spec import ColumnSplit, TensorSpec
from pt_trtllm.errors import ConfigError

METHODS = ("none", "int8_wo", "int4_wo", "fp8_wo", "fp8")
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
GROUP_SIZES = (32, 128)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    method: str = "none"
    group_size: int = 128
    """Inputs per scale of int4_wo."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"quantization is {self.method!r}, expected one of {list(METHODS)}")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"quantization: group size is {self.group_size}, expected one of {list(GROUP_SIZES)}")

    @property
    def is_fp8(self) -> bool:
        return self.method in ("fp8_wo", "fp8")

    @property
    def quantizes_inputs(self) -> bool:
        """Whether products take their inputs in 8 bits as well."""
        return self.method == "fp8"

    def to_trtllm(self) -> dict[str, Any]:
        """TensorRT-LLM's `quantization` section; only keys its QuantConfig knows."""
        if self.method == "int8_wo":
            return {"quant_algo": "W8A16"}
        if self.method == "int4_wo":
            return {"quant_algo": "W4A16_GPTQ", "group_size": self.group_size, "has_zero_point": True}
        if self.is_fp8:  # its only name for e4m3 weights with a scale per row
            return {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
        return {"quant_algo": None}

    def check(self, spec: TensorSpec, tp_size: int) -> None:
        """Raises when the groups of a tensor would straddle a tensor-parallel cut."""
        if self.method != "int4_wo" or not spec.quantizable:
            return
        columns = spec.columns // tp_size if isinstance(spec.split, ColumnSplit) else spec.columns
        if columns % self.group_size:
            raise ConfigError(
                f"int4_wo: {spec.name} has {columns} inputs per rank, not a multiple of the group size "
                f"{self.group_size}; use --group-size 32, int8_wo, or fewer ranks"
            )


@dataclass(frozen=True)
class StoredTensor:
    """A part of a logical tensor as it lies in a rank file: `columns` of `dtype` for every row of the logical one."""

    suffix: str
    """Replaces 'weight' in the logical name."""
    dtype: torch.dtype
    columns: int
    per_row: bool = False
    """One value per row: the column axis is left out of the shape."""


def stored_parts(spec: TensorSpec, dtype: torch.dtype, quantization: Quantization) -> list[StoredTensor]:
    if not spec.quantizable or quantization.method == "none":
        return [StoredTensor("", dtype, spec.columns, per_row=len(spec.shape) == 1)]
    if quantization.method == "int8_wo":
        return [
            StoredTensor("weight", torch.int8, spec.columns),
            StoredTensor("per_channel_scale", dtype, 1, per_row=True),
        ]
    if quantization.is_fp8:
        return [
            StoredTensor("weight", E4M3, spec.columns),
            StoredTensor("per_channel_scale", torch.float32, 1, per_row=True),
        ]
    groups = spec.columns // quantization.group_size
    return [
        StoredTensor("weight", torch.uint8, spec.columns // 2),
        StoredTensor("weights_scaling_factor", dtype, groups),
        StoredTensor("zero", dtype, groups),
    ]


def stored_name(spec_name: str, part: StoredTensor) -> str:
    return spec_name.removesuffix("weight") + part.suffix if part.suffix else spec_name


def quantize_rows(block: torch.Tensor, dtype: torch.dtype, quantization: Quantization) -> list[torch.Tensor]:
    """A block of rows [rows, in] to the parts of `stored_parts`, in order. Scales are rounded before they are used."""
    block = block.float()
    if quantization.method == "int8_wo":
        scale = (block.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny).to(dtype)
        return [(block / _nonzero(scale)).round().clamp(-127, 127).to(torch.int8), scale]
    if quantization.is_fp8:
        scale = (block.abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        return [(block / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale]
    groups = block.view(block.shape[0], -1, quantization.group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).to(dtype)
    zero = (low + 8 * scale.float()).to(dtype)
    codes = ((groups - zero.float()[..., None]) / _nonzero(scale)[..., None]).round().add(8).clamp(0, 15)
    codes = codes.to(torch.uint8).view(block.shape[0], -1)
    return [codes[:, 0::2] | (codes[:, 1::2] << 4), scale, zero]


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """[..., in / 2] uint8 to [..., in] codes 0..15 (uint8)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantize(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stored parts of one weight, by suffix, back to float32 [..., out, in]."""
    weight = parts["weight"]
    if weight.dtype in (torch.int8, E4M3):
        return weight.float() * parts["per_channel_scale"].float()[..., None]
    if weight.dtype == torch.uint8:
        codes = unpack_int4(weight).float() - 8
        groups = parts["zero"].shape[-1]
        codes = codes.unflatten(-1, (groups, -1))
        scale, zero = parts["weights_scaling_factor"].float(), parts["zero"].float()
        weight = (codes * scale[..., None] + zero[..., None]).flatten(-2)
    return weight.float()
