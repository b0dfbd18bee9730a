"""The table of layer kinds: a kind's name is TensorRT's `LayerType`, its function computes the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Inputs = Sequence[Any]
"""Tensors in the order of the layer's inputs; None where an optional one is missing."""
Compute = Callable[[Any, Inputs], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class LayerKind:
    layer_class: str
    """The class of the bindings that shows the kind's own fields."""
    compute: Compute


KINDS: dict[str, LayerKind] = {}


def layer_kind(layer_type: str, layer_class: str) -> Callable[[Compute], Compute]:
    def register(compute: Compute) -> Compute:
        KINDS[layer_type] = LayerKind(layer_class, compute)
        return compute

    return register


def axes_of(mask: int) -> list[int]:
    """A bit mask of axes as a list."""
    return [axis for axis in range(32) if mask >> axis & 1]


def present(inputs: Inputs, index: int) -> torch.Tensor | None:
    """An optional input."""
    value = inputs[index] if index < len(inputs) else None
    assert value is None or isinstance(value, torch.Tensor)
    return value


def integers(value: torch.Tensor) -> list[int]:
    """A shape tensor's values."""
    return [int(i) for i in value.reshape(-1)]
