"""Recorded tensors and nodes, and the network under construction (`tensorrt_llm._common`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(eq=False)
class Node:
    op: str
    inputs: tuple[Any, ...]
    """Tensors, or None for optional ones."""
    attributes: dict[str, Any]
    scope: str
    """Path of the module that made it, as in `transformer.layers.0.attention.dense`."""


class Tensor:
    """A value of a recorded network. Networks are strongly typed: operands of arithmetic have one type."""

    def __init__(self, node: Node | None, dtype: str, rank: int, name: str = "", output: int = 0) -> None:
        self.node, self.dtype, self.rank_, self.name, self.output = node, dtype, rank, name, output

    def ndim(self) -> int:
        return self.rank_

    def view(self, shape: Tensor) -> Tensor:
        sizes = shape.node.attributes["sizes"] if shape.node else None
        assert sizes is not None, "view takes the result of concat"
        return record("view", (self, shape), self.dtype, sizes)

    def __add__(self, other: Tensor) -> Tensor:
        return _arithmetic("add", self, other)

    def __sub__(self, other: Tensor) -> Tensor:
        return _arithmetic("sub", self, other)

    def __mul__(self, other: Any) -> Tensor:
        return _arithmetic("mul", self, other)

    def mark_output(self, name: str, dtype: str) -> None:
        default_net().outputs[name] = record("cast", (self,), dtype, self.rank_)


def _arithmetic(op: str, x: Tensor, y: Any) -> Tensor:
    if isinstance(y, (int, float)):
        return record(f"{op}_scalar", (x,), x.dtype, x.rank_, value=float(y))
    if x.dtype != y.dtype or x.dtype not in FLOATS:
        raise TypeError(f"{op} of {x.dtype} and {y.dtype} in a strongly typed network")
    return record(op, (x, y), x.dtype, max(x.rank_, y.rank_))


@dataclass
class Network:
    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    scope: list[str] = field(default_factory=list)
    plugin_config: Any = field(
        default_factory=lambda: SimpleNamespace(
            gemm_allreduce_plugin=None, remove_input_padding=True, reduce_fusion=False, norm_quant_fusion=False
        )
    )


_current: list[Network] = []


def default_net() -> Network:
    assert _current, "no network is being defined"
    return _current[-1]


@contextmanager
def net_guard(network: Network) -> Iterator[None]:
    _current.append(network)
    try:
        yield
    finally:
        _current.pop()


def record(op: str, inputs: Sequence[Any], dtype: str, rank: int, **attributes: Any) -> Tensor:
    network = default_net()
    node = Node(op, tuple(inputs), attributes, ".".join(network.scope))
    network.nodes.append(node)
    return Tensor(node, dtype, rank)
