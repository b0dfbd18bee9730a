"""Layers that compute each element by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from pt_trtllm.testing.network_evaluator.kinds import Inputs, layer_kind
from pt_trtllm.testing.network_evaluator.values import NotEvaluated, constant_value, converted

T = torch.Tensor


@layer_kind("CONSTANT", "IConstantLayer")
def constant(layer: Any, inputs: Inputs) -> list[T]:
    return [constant_value(layer.weights, tuple(layer.shape))]


@layer_kind("CAST", "ICastLayer")
def cast(layer: Any, inputs: Inputs) -> list[T]:
    return [converted(inputs[0], layer.to_type)]


@layer_kind("IDENTITY", "IIdentityLayer")
def identity(layer: Any, inputs: Inputs) -> list[T]:
    return [converted(inputs[0], layer.get_output(0).dtype)]


@layer_kind("ASSERTION", "IAssertionLayer")
def assertion(layer: Any, inputs: Inputs) -> list[T]:
    assert bool(inputs[0].all()), f"the network's own assertion fails: {layer.message}"
    return []


@layer_kind("SELECT", "ISelectLayer")
def select(layer: Any, inputs: Inputs) -> list[T]:
    condition, chosen, otherwise = inputs
    return [torch.where(condition, chosen, otherwise)]


def _divide(x: T, y: T) -> T:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


BINARY: dict[str, Callable[[T, T], T]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _divide,
    "POW": torch.pow,
    "FLOOR_DIV": torch.floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


@layer_kind("ELEMENTWISE", "IElementWiseLayer")
def elementwise(layer: Any, inputs: Inputs) -> list[T]:
    x, y = inputs
    if x.dim() != y.dim() or x.dtype != y.dtype:
        raise NotEvaluated(f"elementwise of {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}")
    return [BINARY[layer.op.name](x, y)]


UNARY: dict[str, Callable[[T], T]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}


@layer_kind("UNARY", "IUnaryLayer")
def unary(layer: Any, inputs: Inputs) -> list[T]:
    return [UNARY[layer.op.name](inputs[0])]


# Each with the layer's alpha and beta, as `ActivationType` documents them.
ACTIVATIONS: dict[str, Callable[[T, float, float], T]] = {
    "RELU": lambda x, a, b: x.relu(),
    "SIGMOID": lambda x, a, b: x.sigmoid(),
    "TANH": lambda x, a, b: x.tanh(),
    "LEAKY_RELU": lambda x, a, b: torch.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * (x.exp() - 1)),
    "SELU": lambda x, a, b: torch.where(x > 0, b * x, b * (a * x.exp() - a)),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.log((b * x).exp() + 1),
    "CLIP": lambda x, a, b: x.clamp(a, b),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
    "SCALED_TANH": lambda x, a, b: a * (b * x).tanh(),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, 0.0),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "GELU_TANH": lambda x, a, b: functional.gelu(x, approximate="tanh"),
}


@layer_kind("ACTIVATION", "IActivationLayer")
def activation(layer: Any, inputs: Inputs) -> list[T]:
    """`type` of this class is the kind of activation, no longer the kind of layer."""
    return [ACTIVATIONS[layer.type.name](inputs[0], layer.alpha, layer.beta)]
