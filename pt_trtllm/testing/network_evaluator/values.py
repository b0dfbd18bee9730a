"""TensorRT's data types as they are held here, and the bytes of constants.

All floating types are held in float32; `rounded` brings a value to what its declared type can hold.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

HELD_AS = {
    "FLOAT": torch.float32,
    "HALF": torch.float32,
    "BF16": torch.float32,
    "FP8": torch.float32,
    "INT4": torch.int8,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
NARROW_FLOATS = {"HALF": torch.float16, "BF16": torch.bfloat16}
FP8_MAX = 448.0


class NotEvaluated(Exception):
    """The network uses something whose meaning is not covered here, or that the documentation leaves open."""


def held_type(data_type: Any) -> torch.dtype:
    if data_type.name not in HELD_AS:
        raise NotEvaluated(f"data type {data_type.name}")
    return HELD_AS[data_type.name]


def rounded(value: torch.Tensor, data_type: Any) -> torch.Tensor:
    """To the nearest value of a declared floating type; others pass."""
    if data_type.name == "FP8":
        return to_fp8(value)
    narrow = NARROW_FLOATS.get(data_type.name)
    return value if narrow is None else value.to(narrow).float()


def to_fp8(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def converted(value: torch.Tensor, data_type: Any) -> torch.Tensor:
    """What a cast computes: floats become integers by truncation, anything but zero becomes true."""
    if data_type.name in ("FP8", "INT4"):
        raise NotEvaluated(f"cast to {data_type.name}")
    return value.to(held_type(data_type))


def constant_value(weights: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of an `IConstantLayer`; the bindings give an array only for types that numpy has."""
    if isinstance(weights, np.ndarray):
        value = torch.from_numpy(weights.copy())
        return value.float().reshape(shape) if value.is_floating_point() else value.reshape(shape)
    name, count = weights.dtype.name, int(weights.size)
    if name == "BF16":
        return _memory(weights, 2 * count).view(torch.bfloat16).float().reshape(shape)
    if name == "FP8":
        return _memory(weights, count).view(torch.float8_e4m3fn).float().reshape(shape)
    if name == "INT4":
        packed = _memory(weights, (count + 1) // 2).view(torch.int8)
        low, high = (packed << 4) >> 4, packed >> 4  # the first of two values is in the low half of a byte
        return torch.stack([low, high], dim=-1).flatten()[:count].reshape(shape)
    raise NotEvaluated(f"constants of type {name}")


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights` of the public header."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _memory(weights: Any, num_bytes: int) -> torch.Tensor:
    """The bytes a `trt.Weights` points to. The bindings do not show the pointer: it is read from the object itself,
    whose first word after Python's header points to the C++ struct; type and count are checked against the bindings'.
    """
    struct_address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    if struct_address is None:
        raise NotEvaluated("constants whose memory the bindings do not hold")
    struct = _Weights.from_address(struct_address)
    if (struct.type, struct.count) != (int(weights.dtype), int(weights.size)) or not struct.values:
        raise NotEvaluated("constants: these bindings hold trt.Weights in another layout")
    return torch.frombuffer(bytearray(ctypes.string_at(struct.values, num_bytes)), dtype=torch.uint8)
