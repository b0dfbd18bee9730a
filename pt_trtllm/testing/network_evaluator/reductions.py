"""Layers that combine elements along axes: reductions, products, norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pt_trtllm.testing.network_evaluator.kinds import Inputs, axes_of, integers, layer_kind, present
from pt_trtllm.testing.network_evaluator.values import NotEvaluated

T = torch.Tensor


@layer_kind("REDUCE", "IReduceLayer")
def reduce(layer: Any, inputs: Inputs) -> list[T]:
    value, op = inputs[0], layer.op.name
    if op == "AVG" and not value.is_floating_point():
        raise NotEvaluated("average of integers")
    axes, keep = axes_of(layer.axes), layer.keep_dims
    if op == "PROD":
        for axis in reversed(axes):
            value = value.prod(axis, keepdim=keep)
        return [value.to(inputs[0].dtype)]
    functions: dict[str, Callable[..., T]] = {"SUM": torch.sum, "AVG": torch.mean, "MAX": torch.amax, "MIN": torch.amin}
    return [functions[op](value, dim=axes, keepdim=keep).to(value.dtype)]


@layer_kind("SOFTMAX", "ISoftMaxLayer")
def softmax(layer: Any, inputs: Inputs) -> list[T]:
    (axis,) = axes_of(layer.axes)
    return [inputs[0].softmax(dim=axis)]


@layer_kind("TOPK", "ITopKLayer")
def topk(layer: Any, inputs: Inputs) -> list[T]:
    """Values sorted, and their indices. Of equal values the first is taken."""
    (axis,) = axes_of(layer.axes)
    dynamic = present(inputs, 1)
    count = layer.k if dynamic is None else integers(dynamic)[0]
    values, indices = inputs[0].sort(dim=axis, descending=layer.op.name == "MAX", stable=True)
    index_type = torch.int64 if layer.indices_type.name == "INT64" else torch.int32
    return [values.narrow(axis, 0, count), indices.narrow(axis, 0, count).to(index_type)]


@layer_kind("CUMULATIVE", "ICumulativeLayer")
def cumulative(layer: Any, inputs: Inputs) -> list[T]:
    value, (axis,) = inputs[0], integers(inputs[1])
    if layer.op.name != "SUM":
        raise NotEvaluated(f"cumulative {layer.op.name}")
    value = value.flip(axis) if layer.reverse else value
    total = value.cumsum(axis, dtype=value.dtype)
    total = total - value if layer.exclusive else total
    return [total.flip(axis) if layer.reverse else total]


@layer_kind("MATRIX_MULTIPLY", "IMatrixMultiplyLayer")
def matrix_multiply(layer: Any, inputs: Inputs) -> list[T]:
    x, y = _operand(inputs[0], layer.op0.name, -2), _operand(inputs[1], layer.op1.name, -1)
    product = torch.matmul(x, y)
    if layer.op1.name == "VECTOR":
        product = product.squeeze(-1)
    if layer.op0.name == "VECTOR":
        product = product.squeeze(-1 if layer.op1.name == "VECTOR" else -2)
    return [product]


def _operand(value: T, op: str, vector_axis: int) -> T:
    """A vector on the left is a row, on the right a column."""
    if op == "TRANSPOSE":
        return value.transpose(-1, -2)
    return value if op == "NONE" else value.unsqueeze(vector_axis)


@layer_kind("EINSUM", "IEinsumLayer")
def einsum(layer: Any, inputs: Inputs) -> list[T]:
    return [torch.einsum(layer.equation, *inputs)]


@layer_kind("NORMALIZATION", "INormalizationLayer")
def normalization(layer: Any, inputs: Inputs) -> list[T]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the layer's axes."""
    x, scale, bias = inputs
    if not layer.is_v2 or layer.num_groups != 1:
        raise NotEvaluated(f"normalization with is_v2 {layer.is_v2} and {layer.num_groups} groups")
    axes = axes_of(layer.axes)
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    return [centred / (variance + layer.epsilon).sqrt() * scale + bias]
