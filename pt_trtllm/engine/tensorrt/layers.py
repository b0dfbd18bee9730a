"""Single layers of an `INetworkDefinition`, as functions of tensors: what the lowering is written with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pt_trtllm.engine.tensorrt.library import Library
from pt_trtllm.errors import EngineError

Tensor = Any
"""An `ITensor`: the packages ship no types."""


class Layers:
    """Adds layers to a network. Constants point into memory that `keep` holds until the engine is built."""

    def __init__(self, library: Library, network: Any) -> None:
        self.library, self.trt, self.network = library, library.module, network
        self.keep: list[torch.Tensor] = []
        self._constants: dict[str, Tensor] = {}

    # Constants ------------------------------------------------------------------------------------------------

    def constant(self, name: str, values: torch.Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """A constant that reads `values` in place; the same name gives the same constant."""
        return self.raw_constant(name, values, self.library.dtype(values.dtype), shape or values.shape)

    def raw_constant(self, name: str, values: torch.Tensor, dtype: Any, shape: Sequence[int]) -> Tensor:
        """A constant whose bytes mean another type than torch's (int4: two in a byte)."""
        if name not in self._constants:
            assert values.is_contiguous(), name
            self.keep.append(values)
            weights = self.trt.Weights(dtype, values.data_ptr(), math.prod(shape))
            layer = self.network.add_constant(self.trt.Dims(list(shape)), weights)
            self._constants[name] = self.output(layer, name)
        return self._constants[name]

    def scalar(self, value: float, like: Tensor) -> Tensor:
        """One value of the type and the number of axes of `like`."""
        dtypes = {self.library.dtype(t): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.int32)}
        dtype, rank = dtypes[like.dtype], len(like.shape)
        return self.constant(f"{value!r} {dtype} rank {rank}", torch.full((1,) * rank, value, dtype=dtype))

    def int64(self, *values: int) -> Tensor:
        """A shape, or a part of one."""
        return self.constant(f"int64 {list(values)}", torch.tensor(values, dtype=torch.int64))

    # Arithmetic -----------------------------------------------------------------------------------------------

    def elementwise(self, op: str, x: Tensor, y: Tensor) -> Tensor:
        layer = self.network.add_elementwise(x, y, getattr(self.trt.ElementWiseOperation, op))
        return self.output(layer)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.elementwise("SUM", x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self.elementwise("PROD", x, y)

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return self.mul(x, self.scalar(factor, x))

    def unary(self, op: str, x: Tensor) -> Tensor:
        return self.output(self.network.add_unary(x, getattr(self.trt.UnaryOperation, op)))

    def activation(self, op: str, x: Tensor) -> Tensor:
        return self.output(self.network.add_activation(x, getattr(self.trt.ActivationType, op)))

    def silu(self, x: Tensor) -> Tensor:
        return self.mul(x, self.activation("SIGMOID", x))

    def reduce(self, op: str, x: Tensor, axis: int, *, keep: bool) -> Tensor:
        mask = 1 << (axis % len(x.shape))
        return self.output(self.network.add_reduce(x, getattr(self.trt.ReduceOperation, op), mask, keep))

    def matmul(self, x: Tensor, y: Tensor, *, transposed: bool) -> Tensor:
        """x @ y, or x @ y^T; leading axes are batches and broadcast."""
        kinds = self.trt.MatrixOperation
        layer = self.network.add_matrix_multiply(x, kinds.NONE, y, kinds.TRANSPOSE if transposed else kinds.NONE)
        return self.output(layer)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        wanted = self.library.dtype(dtype)
        return x if x.dtype == wanted else self.output(self.network.add_cast(x, wanted))

    def cast_like(self, x: Tensor, like: Tensor) -> Tensor:
        return x if x.dtype == like.dtype else self.output(self.network.add_cast(x, like.dtype))

    # Shapes ---------------------------------------------------------------------------------------------------

    def shape(self, x: Tensor) -> Tensor:
        """int64, one value per axis."""
        return self.output(self.network.add_shape(x))

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """0 keeps the size of the axis at the same place, -1 takes what is left."""
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = self.trt.Dims(list(shape))
        return self.output(layer)

    def reshape_to(self, x: Tensor, shape: Tensor) -> Tensor:
        layer = self.network.add_shuffle(x)
        layer.set_input(1, shape)
        return self.output(layer)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        layer = self.network.add_shuffle(x)
        layer.first_transpose = self.trt.Permutation(list(order))
        return self.output(layer)

    def concat(self, parts: Sequence[Tensor], axis: int = 0) -> Tensor:
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self.output(layer)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
        """Slices of an axis of known size, one after the other; the other axes may be dynamic."""
        rank, parts, start = len(x.shape), [], 0
        axis %= rank
        whole = self.shape(x)
        ones = [1] * rank
        for size in sizes:
            begin = [start if i == axis else 0 for i in range(rank)]
            layer = self.network.add_slice(x, self.trt.Dims(begin), self.trt.Dims(ones), self.trt.Dims(ones))
            layer.set_input(2, self._with_axis(whole, axis, rank, size))
            parts.append(self.output(layer))
            start += size
        return parts

    def _with_axis(self, shape: Tensor, axis: int, rank: int, size: int) -> Tensor:
        """A shape with one axis replaced: min(shape, [huge, .., size, .., huge])."""
        bounds = [size if i == axis else (1 << 31) - 1 for i in range(rank)]
        return self.elementwise("MIN", shape, self.int64(*bounds))

    def gather(self, x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
        return self.output(self.network.add_gather(x, indices, axis))

    # ----------------------------------------------------------------------------------------------------------

    def output(self, layer: Any, name: str | None = None) -> Tensor:
        """A layer's output; TensorRT returns None where it refuses arguments and says why in its log."""
        if layer is None:
            raise EngineError("TensorRT refused a layer of the network; its messages say why")
        if name is not None:
            layer.name = name
        return layer.get_output(0)
