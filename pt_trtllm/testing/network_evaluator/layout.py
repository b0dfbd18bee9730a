"""Layers that move elements: reshaping, slicing, gathering, scattering; and those that make shapes and ranges."""

from __future__ import annotations

from typing import Any

import torch

from pt_trtllm.testing.network_evaluator.kinds import Inputs, integers, layer_kind, present
from pt_trtllm.testing.network_evaluator.values import NotEvaluated, converted

T = torch.Tensor


@layer_kind("SHAPE", "IShapeLayer")
def shape(layer: Any, inputs: Inputs) -> list[T]:
    return [torch.tensor(inputs[0].shape, dtype=torch.int64)]


@layer_kind("SHUFFLE", "IShuffleLayer")
def shuffle(layer: Any, inputs: Inputs) -> list[T]:
    """Transpose, reshape, transpose. In the new shape 0 copies the input's length (if the layer says so), -1 infers."""
    value = inputs[0].permute(_order(layer.first_transpose, inputs[0].dim()))
    dynamic = present(inputs, 1)
    wanted = integers(dynamic) if dynamic is not None else _static(layer.reshape_dims)
    if wanted is not None:
        if layer.zero_is_placeholder:
            wanted = [value.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
        value = value.reshape(wanted)
    return [value.permute(_order(layer.second_transpose, value.dim()))]


def _order(permutation: Any, rank: int) -> list[int]:
    return [int(axis) for axis in permutation][:rank]


def _static(dims: Any) -> list[int] | None:
    """Dimensions given as parameters; None where they were not set."""
    try:
        return None if dims is None else [int(size) for size in dims]
    except ValueError:  # the bindings' way to say that there are none
        return None


@layer_kind("SQUEEZE", "ISqueezeLayer")
def squeeze(layer: Any, inputs: Inputs) -> list[T]:
    value, axes = inputs[0], [axis % inputs[0].dim() for axis in integers(inputs[1])]
    if any(value.shape[axis] != 1 for axis in axes):
        raise NotEvaluated(f"squeeze of axes {axes} of {list(value.shape)}")
    return [value.reshape([size for axis, size in enumerate(value.shape) if axis not in axes])]


@layer_kind("UNSQUEEZE", "IUnsqueezeLayer")
def unsqueeze(layer: Any, inputs: Inputs) -> list[T]:
    value = inputs[0]
    rank = value.dim() + len(integers(inputs[1]))
    for axis in sorted(axis % rank for axis in integers(inputs[1])):
        value = value.unsqueeze(axis)
    return [value]


@layer_kind("CONCATENATION", "IConcatenationLayer")
def concatenation(layer: Any, inputs: Inputs) -> list[T]:
    return [torch.cat(list(inputs), dim=layer.axis)]


@layer_kind("SLICE", "ISliceLayer")
def slice_layer(layer: Any, inputs: Inputs) -> list[T]:
    """Along each axis the elements start, start + stride, ...; `mode` says what lies beyond the ends."""
    value, mode = inputs[0], layer.mode.name
    starts, sizes, strides = (
        integers(dynamic) if (dynamic := present(inputs, index)) is not None else [int(i) for i in getattr(layer, name)]
        for index, name in ((1, "start"), (2, "shape"), (3, "stride"))
    )
    dynamic_axes = present(inputs, 5)
    axes = integers(dynamic_axes) if dynamic_axes is not None else _static(layer.axes) or list(range(value.dim()))
    outside = torch.zeros((), dtype=torch.bool)
    for axis, start, size, stride in zip(axes, starts, sizes, strides, strict=True):
        length = value.shape[axis]
        index = start + stride * torch.arange(size)
        beyond = (index < 0) | (index >= length)
        if mode == "STRICT_BOUNDS":
            assert not beyond.any(), f"slice {layer.name}: {index.tolist()} of {length} elements"
        elif mode == "WRAP":
            index = index % length
        elif mode == "CLAMP":
            index = index.clamp(0, length - 1)
        elif mode == "FILL":
            outside = outside | beyond.reshape([-1 if a == axis % value.dim() else 1 for a in range(value.dim())])
            index = index.clamp(0, length - 1)
        else:
            raise NotEvaluated(f"slice with mode {mode}")
        value = value.index_select(axis, index)
    if mode == "FILL":
        value = torch.where(outside, inputs[4].to(value.dtype), value)
    return [value]


@layer_kind("GATHER", "IGatherLayer")
def gather(layer: Any, inputs: Inputs) -> list[T]:
    data, index, axis = inputs[0], inputs[1].long(), layer.axis
    mode, shared = layer.mode.name, layer.num_elementwise_dims
    if mode == "ND":
        if shared:
            raise NotEvaluated("gather ND with elementwise dimensions")
        return [data[tuple(index.unbind(-1))]]
    _check_range(layer, index, data.shape[axis])
    index = torch.where(index < 0, index + data.shape[axis], index)
    if mode == "ELEMENT":
        return [data.gather(axis, index)]
    if shared:
        rows = max(data.shape[0], index.shape[0])
        data, index = (t.expand(rows, *t.shape[1:]) for t in (data, index))
        return [torch.stack([_take(data[row], axis - 1, index[row]) for row in range(rows)])]
    return [_take(data, axis, index)]


def _take(data: T, axis: int, index: T) -> T:
    taken = data.index_select(axis, index.reshape(-1))
    return taken.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def _check_range(layer: Any, index: T, length: int) -> None:
    """TensorRT reads zeros out of range; none of our networks means that, so it is an error here."""
    outside = (index < -length) | (index >= length)
    assert not outside.any(), f"{layer.name}: index {int(index[outside][0])} of {length} elements"


@layer_kind("SCATTER", "IScatterLayer")
def scatter(layer: Any, inputs: Inputs) -> list[T]:
    data, index, updates = inputs[0].clone(), inputs[1].long(), inputs[2]
    if layer.mode.name == "ELEMENT":
        _check_range(layer, index, data.shape[layer.axis])
        return [data.scatter(layer.axis, torch.where(index < 0, index + data.shape[layer.axis], index), updates)]
    data[tuple(index.unbind(-1))] = updates
    return [data]


@layer_kind("ONE_HOT", "IOneHotLayer")
def one_hot(layer: Any, inputs: Inputs) -> list[T]:
    index, (off_value, on_value), depth = inputs[0], inputs[1], integers(inputs[2])[0]
    axis = layer.axis % (index.dim() + 1)
    classes = torch.arange(depth).reshape([-1 if a == axis else 1 for a in range(index.dim() + 1)])
    return [torch.where(index.unsqueeze(axis) == classes, on_value, off_value)]


@layer_kind("FILL", "IFillLayer")
def fill(layer: Any, inputs: Inputs) -> list[T]:
    """alpha + the sum of beta[axis] times the index along each axis."""
    if layer.operation.name != "LINSPACE":
        raise NotEvaluated(f"fill {layer.operation.name}")
    dims, alpha, beta = (present(inputs, index) for index in range(3))
    sizes = integers(dims) if dims is not None else [int(size) for size in layer.shape]
    start = layer.alpha if alpha is None else alpha.reshape(()).item()
    steps = [layer.beta] if beta is None else beta.reshape(-1).tolist()
    value = torch.full(sizes, start, dtype=torch.float64)
    for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        value = value + step * torch.arange(size).reshape([-1 if a == axis else 1 for a in range(len(sizes))])
    return [converted(value, layer.to_type)]
