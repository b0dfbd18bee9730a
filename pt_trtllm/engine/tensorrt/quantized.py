"""Products with weights as they are stored: float, int8 per output, int4 in groups of inputs with zeros.

The codes stay codes in the engine; `IDequantizeLayer` widens them. TensorRT's int4 is signed and symmetric, ours has a
zero per group: w = (q - 8) * scale + zero, so x @ w^T = x @ dequantized^T + (sums of x over groups) @ zero^T.
"""

from __future__ import annotations

import torch

from pt_trtllm.engine.tensorrt.layers import Layers, Tensor
from pt_trtllm.engine.tensorrt.weights import Parts

SIGN_BITS = 0x88
"""Flips codes 0..15 to two's complement of -8..7, two at a time."""


def linear(layers: Layers, x: Tensor, name: str, parts: Parts) -> Tensor:
    """[tracks, tokens, in] x [tracks, out, in] to [tracks, tokens, out]"""
    weight = parts["weight"]
    if weight.dtype == torch.uint8:
        return _int4_linear(layers, x, name, parts)
    if "per_channel_scale" in parts:
        tracks, rows, columns = weight.shape
        codes = layers.constant(name, weight, (tracks * rows, columns))
        scale = layers.constant(f"{name}.scale", parts["per_channel_scale"].flatten())
        return layers.matmul(x, _dequantize(layers, codes, scale, x, weight.shape), transposed=True)
    return layers.matmul(x, layers.constant(name, weight), transposed=True)


def _int4_linear(layers: Layers, x: Tensor, name: str, parts: Parts) -> Tensor:
    tracks, rows, half = parts["weight"].shape
    groups = parts["zero"].shape[-1]
    codes = layers.raw_constant(name, parts["weight"] ^ SIGN_BITS, layers.trt.int4, (tracks * rows, 2 * half))
    scale = layers.constant(f"{name}.scale", parts["weights_scaling_factor"].flatten(0, 1))
    y = layers.matmul(x, _dequantize(layers, codes, scale, x, (tracks, rows, 2 * half)), transposed=True)
    grouped = layers.reshape(layers.cast(x, torch.float32), (tracks, -1, groups, 2 * half // groups))
    sums = layers.cast_like(layers.reduce("SUM", grouped, 3, keep=False), x)
    return layers.add(y, layers.matmul(sums, layers.constant(f"{name}.zero", parts["zero"]), transposed=True))


def _dequantize(layers: Layers, codes: Tensor, scale: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Codes [rows, in] with a scale per row or per block of inputs; the result in the type of `like`."""
    layer = layers.network.add_dequantize(codes, scale, like.dtype)
    if len(scale.shape) == 1:
        layer.axis = 0
    return layers.reshape(layers.output(layer), shape)


def chosen_experts(layers: Layers, experts: Tensor, name: str, parts: Parts, dtype: torch.dtype) -> Tensor:
    """The weights of some experts of each track: [tracks, experts, out, in] and [tracks, chosen] to
    [tracks, chosen, out, in]. Only what is chosen is read and widened."""
    weight = _gathered(layers, experts, name, parts["weight"])
    if "per_channel_scale" in parts:
        codes = _widened(layers, weight, name, dtype)
        scale = _gathered(layers, experts, f"{name}.scale", parts["per_channel_scale"][..., None])
        return layers.mul(codes, scale)
    if "zero" in parts:
        return _int4_experts(layers, experts, weight, name, parts, dtype)
    return weight


def _int4_experts(
    layers: Layers, experts: Tensor, packed: Tensor, name: str, parts: Parts, dtype: torch.dtype
) -> Tensor:
    """There is no gather of 4-bit values: bytes are gathered, and split by arithmetic.

    With its top bit flipped, a byte read as signed is 16 * (high - 8) + low.
    """
    tracks, _, rows, half = parts["weight"].shape
    groups = parts["zero"].shape[-1]
    value = _widened(layers, packed, name, dtype)  # up to 128 in size: exact in every type, and so are the steps
    high = layers.unary("FLOOR", layers.scaled(value, 1 / 16))
    low = layers.add(layers.elementwise("SUB", value, layers.scaled(high, 16.0)), layers.scalar(-8.0, value))
    pairs = [layers.reshape(part, (tracks, -1, rows * half, 1)) for part in (low, high)]
    codes = layers.reshape(layers.concat(pairs, axis=3), (tracks, -1, rows * groups, 2 * half // groups))
    scale, zero = (
        layers.cast(
            layers.reshape(_gathered(layers, experts, f"{name}.{key}", parts[key]), (tracks, -1, rows * groups, 1)),
            torch.float32,
        )
        for key in ("weights_scaling_factor", "zero")
    )
    weight = layers.cast(layers.add(layers.mul(layers.cast(codes, torch.float32), scale), zero), dtype)
    return layers.reshape(weight, (tracks, -1, rows, 2 * half))


def _gathered(layers: Layers, experts: Tensor, name: str, values: torch.Tensor) -> Tensor:
    """Along the axis of experts, for each track its own."""
    if values.dtype == torch.uint8:
        values = (values ^ 0x80).view(torch.int8)
    layer = layers.network.add_gather(layers.constant(name, values), experts, 1)
    layer.num_elementwise_dims = 1
    return layers.output(layer)


def _widened(layers: Layers, codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """int8 codes as numbers."""
    one = layers.constant(f"one {dtype}", torch.ones((), dtype=dtype))
    return layers.output(layers.network.add_dequantize(codes, one, layers.library.dtype(dtype)))
