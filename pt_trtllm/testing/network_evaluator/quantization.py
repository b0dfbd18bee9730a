"""Quantize and dequantize: per tensor, per channel, and in blocks. Only symmetric quantisation exists."""

from __future__ import annotations

from typing import Any

import torch

from pt_trtllm.testing.network_evaluator.kinds import Inputs, layer_kind, present
from pt_trtllm.testing.network_evaluator.values import NotEvaluated, to_fp8

INTEGER_RANGES = {"INT8": (-128, 127), "INT4": (-8, 7)}


@layer_kind("QUANTIZE", "IQuantizeLayer")
def quantize(layer: Any, inputs: Inputs) -> list[torch.Tensor]:
    scaled = inputs[0] / _scale(layer, inputs)
    name = layer.to_type.name
    if name == "FP8":
        return [to_fp8(scaled)]
    if name not in INTEGER_RANGES:
        raise NotEvaluated(f"quantize to {name}")
    return [scaled.round().clamp(*INTEGER_RANGES[name]).to(torch.int8)]


@layer_kind("DEQUANTIZE", "IDequantizeLayer")
def dequantize(layer: Any, inputs: Inputs) -> list[torch.Tensor]:
    return [inputs[0].float() * _scale(layer, inputs)]


def _scale(layer: Any, inputs: Inputs) -> torch.Tensor:
    """The scale of every element: one, one per index of the axis, or one per block."""
    value: torch.Tensor = inputs[0]
    scale: torch.Tensor = inputs[1]
    zero = present(inputs, 2)
    if zero is not None and zero.any():
        raise NotEvaluated(f"{layer.name}: zero points other than zero")
    if not (scale > 0).all():
        raise NotEvaluated(f"{layer.name}: scales must be above zero")
    block = _block_shape(layer)
    if scale.numel() == 1 and not block:
        return scale.reshape(())
    if scale.dim() == 1 and not block:
        axis = layer.axis % value.dim()
        if len(scale) != value.shape[axis]:
            raise NotEvaluated(f"{layer.name}: {len(scale)} scales for {value.shape[axis]} channels")
        return scale.reshape([-1 if a == axis else 1 for a in range(value.dim())])
    if scale.dim() != value.dim():
        raise NotEvaluated(f"{layer.name}: scale {list(scale.shape)} of {list(value.shape)}")
    for axis, size in enumerate(value.shape):
        repeats = size // scale.shape[axis]
        stated = repeats if not block else size if block[axis] == -1 else block[axis]
        if repeats * scale.shape[axis] != size or stated != repeats:
            raise NotEvaluated(f"{layer.name}: scale {list(scale.shape)} of {list(value.shape)}, blocks of {block}")
        scale = scale.repeat_interleave(repeats, dim=axis)
    return scale


def _block_shape(layer: Any) -> list[int]:
    try:
        return [int(size) for size in layer.block_shape]
    except RuntimeError:  # the bindings' way to say that none was set
        return []
