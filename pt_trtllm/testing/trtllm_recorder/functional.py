"""`tensorrt_llm.functional`"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from pt_trtllm.testing.trtllm_recorder.network import FLOATS, Tensor, record


class AllReduceStrategy(IntEnum):
    NCCL = 0
    AUTO = 3


class AttentionMaskType(IntEnum):
    padding = 0
    causal = 1


class PositionEmbeddingType(IntEnum):
    learned_absolute = 0
    rope_gptj = 1
    rope_gpt_neox = 2

    def is_rope(self) -> bool:
        return self in (self.rope_gptj, self.rope_gpt_neox)

    @classmethod
    def from_string(cls, name: str) -> PositionEmbeddingType:
        return cls[name]


class AllReduceParams:
    """The callee may change it, so each object is good for one call."""

    def __init__(self, strategy: AllReduceStrategy = AllReduceStrategy.AUTO) -> None:
        self.strategy = strategy
        self.used = False


def allreduce(tensor: Tensor, group: list[int], all_reduce_params: AllReduceParams | None = None) -> Tensor:
    if all_reduce_params is None or all_reduce_params.used:
        raise ValueError("allreduce: give every call fresh AllReduceParams; the default object is shared")
    all_reduce_params.used = True
    strategy = all_reduce_params.strategy
    return record("allreduce", (tensor,), tensor.dtype, tensor.ndim(), group=list(group), strategy=strategy)


def allgather(tensor: Tensor, group: list[int], gather_dim: int) -> Tensor:
    return record("allgather", (tensor,), tensor.dtype, tensor.ndim(), group=list(group), dim=gather_dim)


def cast(input: Tensor, dtype: str) -> Tensor:
    if dtype not in FLOATS:
        raise TypeError(f"cast to {dtype}")
    return record("cast", (input,), dtype, input.ndim(), to=dtype)


def constant(ndarray: np.ndarray[Any, Any]) -> Tensor:
    assert ndarray.dtype == np.float32, ndarray.dtype
    return record("constant", (), "float32", ndarray.ndim, value=torch.from_numpy(ndarray.copy()))


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    return record("embedding", (input, weight), weight.dtype, input.ndim() + 1)


def shape(input: Tensor, dim: int) -> Tensor:
    return record("shape", (input,), "int64", 0, dim=dim)


def concat(inputs: Sequence[Tensor | int], dim: int = 0) -> Tensor:
    """Of tensors along an axis, or of sizes to a shape."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if all(isinstance(value, Tensor) and value.ndim() > 0 for value in inputs):
        assert len({value.dtype for value in tensors}) == 1, [value.dtype for value in tensors]
        return record("concat", tensors, tensors[0].dtype, tensors[0].ndim(), dim=dim)
    static = [None if isinstance(value, Tensor) else value for value in inputs]
    return record("sizes", tensors, "int64", 1, static=static, sizes=len(inputs))


def split(tensor: Tensor, split_size_or_sections: int | Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """By a size: two parts here, which is all that is used; or by sections."""
    given = split_size_or_sections
    sections = [given] * 2 if isinstance(given, int) else list(given)
    whole = record("split", (tensor,), tensor.dtype, tensor.ndim(), sections=sections, dim=dim)
    return tuple(Tensor(whole.node, tensor.dtype, tensor.ndim(), output=i) for i in range(len(sections)))


def tanh(input: Tensor) -> Tensor:
    return record("tanh", (input,), input.dtype, input.ndim())


def unsqueeze(input: Tensor, axis: int) -> Tensor:
    return record("unsqueeze", (input,), input.dtype, input.ndim() + 1, axis=axis)


def rms_norm(input: Tensor, normalized_shape: Any, num_groups: int, weight: Tensor | None, eps: float) -> Tensor:
    assert num_groups == 1, num_groups
    if weight is not None and weight.dtype != input.dtype:
        raise TypeError(f"rms_norm of {input.dtype} with a weight of {weight.dtype} in a strongly typed network")
    return record("rms_norm", (input, weight), input.dtype, input.ndim(), eps=eps)
