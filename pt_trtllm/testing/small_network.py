"""A TensorRT network of a few layers: defined in a line, evaluated on the CPU. For tests of the evaluator itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorrt_rtx as trt
import torch

from pt_trtllm.testing.network_evaluator import World

LOGGER = trt.Logger(trt.Logger.ERROR)
TYPES = {
    "float32": trt.float32,
    "float16": trt.float16,
    "int8": trt.int8,
    "int32": trt.int32,
    "int64": trt.int64,
    "bool": trt.bool,
}


Array = np.ndarray[Any, Any]


class Network:
    """A network under definition, and the memory of its constants."""

    def __init__(self) -> None:
        self.builder = trt.Builder(LOGGER)
        self.trt = self.builder.create_network()
        self.feeds: dict[str, torch.Tensor] = {}
        self._arrays: list[Any] = []

    def input(self, value: Array, shape: Sequence[int] | None = None, data_type: Any = None) -> Any:
        name = f"input{len(self.feeds)}"
        self.feeds[name] = torch.from_numpy(value).float() if value.dtype.kind == "f" else torch.from_numpy(value)
        return self.trt.add_input(name, data_type or TYPES[str(value.dtype)], shape or value.shape)

    def constant(self, value: Array, data_type: Any = None, shape: Sequence[int] | None = None) -> Any:
        value = np.asarray(value, order="C")
        self._arrays.append(value)
        shape = value.shape if shape is None else shape
        kind = data_type or TYPES[str(value.dtype)]
        weights = trt.Weights(kind, value.ctypes.data, math.prod(shape))
        return self.trt.add_constant(shape, weights).get_output(0)

    def outputs(self, *tensors: Any, declared_types: bool = False) -> list[Array]:
        for index, tensor in enumerate(tensors):
            tensor.name = f"output{index}"
            self.trt.mark_output(tensor)
        (values,) = World([self.trt], declared_types=declared_types).step([self.feeds])
        return [values[f"output{index}"].numpy() for index in range(len(tensors))]


def computed(define: Callable[[Network], Any], **options: Any) -> Array:
    network = Network()
    layer = define(network)
    return network.outputs(layer.get_output(0), **options)[0]
