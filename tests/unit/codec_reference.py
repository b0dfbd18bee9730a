"""The formats of plugins/src/codecs/README.md in NumPy, value by value, sharing nothing with the library."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

GROUP = {"int8": 32, "fp8": 128, "int4": 32, "mxfp4": 32}
BITS = {"int8": 8.5, "fp8": 8.125, "int4": 4.5, "mxfp4": 4.25}
STEPS = {"int8": 127, "fp8": 448, "int4": 7}

EXPONENTS = st.tuples(st.integers(-150, 127), st.integers(0, 40))
"""The least exponent of two of the values, and the span above it."""

Array = np.ndarray[Any, Any]


def any_values(rows: int, hidden: int, exponents: tuple[int, int], specials: bool, seed: int) -> torch.Tensor:
    """Values of every exponent in a range; some are zeros, NaN or infinities when `specials`."""
    random = np.random.default_rng(seed)
    low, span = exponents
    size = np.exp2(random.integers(low, low + span + 1, (rows, hidden)).astype(np.float64))
    with np.errstate(over="ignore"):
        values = (random.uniform(-2, 2, (rows, hidden)) * size).astype(np.float32)
    if specials:
        odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 2.0**126, 2.0**-100, 2.0**-101], np.float32)
        values = np.where(random.random((rows, hidden)) < 0.02, random.choice(odd, (rows, hidden)), values)
    return torch.from_numpy(values)


def reference_encode(codec: str, x: Array) -> bytes:
    """All codes, all scales, zeros up to 16 bytes."""
    codes, scales = bytearray(), bytearray()
    for row in x:
        padded = np.zeros(-(-len(row) // GROUP[codec]) * GROUP[codec], np.float32)
        padded[: len(row)] = row
        for group in padded.reshape(-1, GROUP[codec]):
            code, scale = _encode_group(codec, group)
            codes += code
            scales += scale
    message = bytes(codes + scales)
    return message + bytes(-len(message) % 16)


def reference_decode(codec: str, message: bytes, rows: int, hidden: int) -> Array:
    size, per_row = GROUP[codec], -(-hidden // GROUP[codec])
    code_bytes = size // (2 if codec in ("int4", "mxfp4") else 1)
    groups = rows * per_row
    values = np.zeros((groups, size), np.float32)
    for index in range(groups):
        codes = np.frombuffer(message, np.uint8, code_bytes, index * code_bytes)
        offset = groups * code_bytes + index * (1 if codec == "mxfp4" else 2)
        values[index] = _decode_group(codec, codes, message[offset:])
    return values.reshape(rows, per_row * size)[:, :hidden]


def _encode_group(codec: str, group: Array) -> tuple[bytes, bytes]:
    largest = np.abs(group).max()
    broken = not largest < 2.0**126  # NaN too
    zero = largest < 2.0**-100
    if codec == "mxfp4":
        mantissa, exponent = np.frexp(np.float32(1.0) if broken or zero else largest)
        power = 0 if zero else int(exponent) - (3 if mantissa * 8 < 7 else 2)
        scale = bytes([255 if broken else power + 127])
        scaled = np.zeros_like(group) if broken else np.ldexp(group, -power)
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        return _pack(np.where(codes == 8, 0, codes)), scale
    exact = np.float32(1.0) if broken else largest * np.float32(1 / STEPS[codec])
    rounded = ml_dtypes.bfloat16(1.0) if zero else exact.astype(ml_dtypes.bfloat16)
    scale = np.array(np.nan if broken else rounded, ml_dtypes.bfloat16).tobytes()
    inverse = np.float32(1) / np.float32(rounded)
    scaled = np.zeros_like(group) if broken else group * inverse
    if codec == "fp8":
        codes = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        return np.where(codes == 0x80, 0, codes).astype(np.uint8).tobytes(), scale
    integers = np.clip(np.rint(scaled), -STEPS[codec], STEPS[codec]).astype(np.int8)
    return (integers.tobytes() if codec == "int8" else _pack(integers.view(np.uint8) & 15)), scale


def _decode_group(codec: str, codes: Array, scale_bytes: bytes) -> Array:
    if codec == "mxfp4":
        exponent = scale_bytes[0]
        scale = np.float32(np.nan) if exponent == 255 else np.float32(2.0 ** (exponent - 127))
        return _unpack(codes).view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    scale = np.frombuffer(scale_bytes, ml_dtypes.bfloat16, 1)[0].astype(np.float32)
    if codec == "fp8":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    integers = codes.view(np.int8) if codec == "int8" else (_unpack(codes) ^ 8).astype(np.int8) - 8
    return integers.astype(np.float32) * scale


def _pack(nibbles: Array) -> bytes:
    """Two neighbours in a byte, the first in its low half."""
    return b"".join(struct.pack("B", int(low) | int(high) << 4) for low, high in nibbles.reshape(-1, 2))


def _unpack(codes: Array) -> Array:
    return np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
