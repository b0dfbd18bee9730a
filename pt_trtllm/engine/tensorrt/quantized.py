"""Products with weights as they are stored: float, int8 per output, int4 in groups of inputs with zeros.

The codes stay codes in the engine; `IDequantizeLayer` widens them. TensorRT's int4 is signed and symmetric, ours has a
zero per group: w = (q - 8) * scale + zero, so x @ w^T = x @ dequantized^T + (sums of x over groups) @ zero^T.

Experts are gathered first, and TensorRT gathers no quantised constants: their codes travel as int32, 4 or 8 in each,
and are taken apart by whole-number arithmetic.
"""

from __future__ import annotations

import torch

from pt_trtllm.engine.tensorrt.layers import Layers, Tensor
from pt_trtllm.engine.tensorrt.weights import Parts
from pt_trtllm.errors import EngineError

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
    weight = parts["weight"]
    if weight.dtype.is_floating_point:
        return _gathered(layers, experts, name, weight)
    bits = 4 if weight.dtype == torch.uint8 else 8
    if weight.shape[-1] % 4:
        raise EngineError(
            f"{name}: {weight.shape[-1] * 8 // bits} inputs of {bits} bits do not fill whole 32-bit words; "
            "convert without quantization"
        )
    tracks, _, rows, _ = weight.shape
    codes = _unpacked(layers, _gathered(layers, experts, name, weight.view(torch.int32)), bits)
    if bits == 8:
        scale = _gathered(layers, experts, f"{name}.scale", parts["per_channel_scale"][..., None])
        return layers.mul(layers.cast(codes, dtype), scale)
    groups = parts["zero"].shape[-1]
    grouped = layers.reshape(codes, (tracks, -1, rows * groups, 2 * weight.shape[-1] // groups))
    scale, zero = (
        layers.cast(
            layers.reshape(_gathered(layers, experts, f"{name}.{key}", parts[key]), (tracks, -1, rows * groups, 1)),
            torch.float32,
        )
        for key in ("weights_scaling_factor", "zero")
    )
    values = layers.add(layers.mul(layers.cast(grouped, torch.float32), scale), zero)
    return layers.reshape(layers.cast(values, dtype), (tracks, -1, rows, 2 * weight.shape[-1]))


def _gathered(layers: Layers, experts: Tensor, name: str, values: torch.Tensor) -> Tensor:
    """Along the axis of experts, for each track its own."""
    layer = layers.network.add_gather(layers.constant(name, values), experts, 1)
    layer.num_elementwise_dims = 1
    return layers.output(layer)


def _unpacked(layers: Layers, words: Tensor, bits: int) -> Tensor:
    """int32 [tracks, chosen, rows, words] to its signed codes, int32 [tracks, chosen, rows, words * 32 / bits].

    The lowest bits are the first code. 8 bits are a two's complement, 4 bits a code 0..15 that means 8 less.
    """
    tracks, _, rows, width = words.shape
    base = 1 << bits
    parts = []
    for _ in range(32 // bits):
        rest = _floor_div(layers, words, base)
        code = layers.elementwise("SUB", words, layers.scaled(rest, base))
        if bits == 8:
            code = layers.elementwise("SUB", code, layers.scaled(_floor_div(layers, code, base // 2), base))
        else:
            code = layers.add(code, layers.scalar(-base // 2, code))
        parts.append(layers.reshape(code, (tracks, -1, rows * width, 1)))
        words = rest
    return layers.reshape(layers.concat(parts, axis=3), (tracks, -1, rows, width * 32 // bits))


def _floor_div(layers: Layers, x: Tensor, divisor: int) -> Tensor:
    return layers.elementwise("FLOOR_DIV", x, layers.scalar(divisor, x))
