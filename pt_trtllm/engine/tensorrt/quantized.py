"""Products with weights as they are stored: float, int8 or float8 per output, int4 in groups of inputs with zeros.

The codes stay codes in the engine; `IDequantizeLayer` widens them. TensorRT's int4 is signed and symmetric, ours has a
zero per group: w = (q - 8) * scale + zero, so x @ w^T = x @ dequantized^T + (sums of x over groups) @ zero^T.

float8 is e4m3. Where inputs are quantised, too, every token has a scale of its own, its largest magnitude. TensorRT
knows only constant scales for a whole tensor: the token is divided by its scale before it is quantised, and the product
is multiplied with it.

Experts are gathered first, and TensorRT gathers no quantised constants: their codes travel as int32, 4 or 8 in each,
and are taken apart by whole-number arithmetic. The values of float8 codes are then looked up: there are only 256.
"""

from __future__ import annotations

import torch

from pt_trtllm.checkpoint.quantize import E4M3, E4M3_MAX
from pt_trtllm.engine.tensorrt.layers import Layers, Tensor
from pt_trtllm.engine.tensorrt.weights import Parts
from pt_trtllm.errors import EngineError

SIGN_BITS = 0x88
"""Flips codes 0..15 to two's complement of -8..7, two at a time."""
SMALLEST_MAGNITUDE = 1e-30
"""A token of zeros is divided by it."""


def linear(layers: Layers, x: Tensor, name: str, parts: Parts, *, quantizes_inputs: bool = False) -> Tensor:
    """[tracks, tokens, in] x [tracks, out, in] to [tracks, tokens, out]"""
    weight = parts["weight"]
    if weight.dtype == torch.uint8:
        return _int4_linear(layers, x, name, parts)
    if "per_channel_scale" in parts:
        tracks, rows, columns = weight.shape
        codes = layers.constant(name, weight, (tracks * rows, columns))
        scale = layers.constant(f"{name}.scale", parts["per_channel_scale"].flatten())
        values = _dequantize(layers, codes, scale, x, weight.shape)
        if not quantizes_inputs:
            return layers.matmul(x, values, transposed=True)
        rounded, largest = _rounded_tokens(layers, x)
        return layers.mul(layers.matmul(rounded, values, transposed=True), largest)
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


def _rounded_tokens(layers: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token over its largest magnitude, as e4m3 holds it, and that magnitude [tracks, tokens, 1].

    Values up to 1 rather than e4m3's 448: their sums stay far from float16's limit.
    """
    exact = layers.cast(x, torch.float32)
    largest = layers.reduce("MAX", layers.unary("ABS", exact), -1, keep=True)
    divisor = layers.elementwise("MAX", largest, layers.scalar(SMALLEST_MAGNITUDE, largest))
    scale = layers.constant("scale of rounded tokens", torch.tensor(1 / E4M3_MAX))
    shares = layers.elementwise("DIV", exact, divisor)
    codes = layers.output(layers.network.add_quantize(shares, scale, layers.library.dtype(E4M3)))
    rounded = layers.output(layers.network.add_dequantize(codes, scale, x.dtype))
    return rounded, layers.cast_like(largest, x)


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
    if weight.dtype.is_floating_point and weight.dtype != E4M3:
        return _gathered(layers, experts, name, weight)
    bits = 4 if weight.dtype == torch.uint8 else 8
    if weight.shape[-1] % 4:
        raise EngineError(
            f"{name}: {weight.shape[-1] * 8 // bits} inputs of {bits} bits do not fill whole 32-bit words; "
            "convert without quantization"
        )
    tracks, _, rows, _ = weight.shape
    words = _gathered(layers, experts, name, weight.view(torch.int32))
    codes = _unpacked(layers, words, bits, signed=weight.dtype != E4M3)
    if weight.dtype == E4M3:
        table = torch.arange(256, dtype=torch.uint8).view(E4M3).float().nan_to_num(0)
        values = layers.gather(layers.constant("values of e4m3", table), codes)
        scale = _gathered(layers, experts, f"{name}.scale", parts["per_channel_scale"][..., None])
        return layers.cast(layers.mul(values, scale), dtype)
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


def _unpacked(layers: Layers, words: Tensor, bits: int, *, signed: bool) -> Tensor:
    """int32 [tracks, chosen, rows, words] to its codes, int32 [tracks, chosen, rows, words * 32 / bits].

    The lowest bits are the first code. Signed, 8 bits are a two's complement, 4 bits a code 0..15 that means 8 less.
    """
    tracks, _, rows, width = words.shape
    base = 1 << bits
    parts = []
    for _ in range(32 // bits):
        rest = _floor_div(layers, words, base)
        code = layers.elementwise("SUB", words, layers.scaled(rest, base))
        if signed and bits == 8:
            code = layers.elementwise("SUB", code, layers.scaled(_floor_div(layers, code, base // 2), base))
        elif signed:
            code = layers.add(code, layers.scalar(-base // 2, code))
        parts.append(layers.reshape(code, (tracks, -1, rows * width, 1)))
        words = rest
    return layers.reshape(layers.concat(parts, axis=3), (tracks, -1, rows, width * 32 // bits))


def _floor_div(layers: Layers, x: Tensor, divisor: int) -> Tensor:
    return layers.elementwise("FLOOR_DIV", x, layers.scalar(divisor, x))
