"""One rank's network, walked layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pt_trtllm.testing.network_evaluator import (  # noqa: F401  each registers its kinds
    layout,
    pointwise,
    quantization,
    reductions,
    transformer,
)
from pt_trtllm.testing.network_evaluator.collectives import Collective, CollectiveLog
from pt_trtllm.testing.network_evaluator.kinds import KINDS
from pt_trtllm.testing.network_evaluator.values import NotEvaluated, held_type, rounded

Meeting = tuple[Collective, int, torch.Tensor]
"""What a rank brings to a collective: arguments, the layer's number of ranks, its own value."""
Walk = Generator[Meeting, torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Node:
    layer: Any
    kind: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Declaration:
    """What TensorRT infers for a tensor."""

    name: str
    data_type: Any
    held_as: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Declaration:
        return cls(tensor.name, tensor.dtype, held_type(tensor.dtype), tuple(tensor.shape))

    def check(self, value: torch.Tensor) -> None:
        fits = len(self.shape) == value.dim() and all(
            d in (-1, s) for d, s in zip(self.shape, value.shape, strict=True)
        )
        if value.dtype != self.held_as or not fits:
            raise NotEvaluated(
                f"{self.name}: computed {value.dtype} {list(value.shape)}, "
                f"the network declares {self.data_type.name} {list(self.shape)}"
            )


class RankNetwork:
    """A network prepared for evaluation: layers in an order in which inputs come before their uses."""

    def __init__(self, network: Any, log: CollectiveLog | None, declared_types: bool) -> None:
        self.declared_types = declared_types
        self._log = log
        self.inputs = {(t := network.get_input(i)).name: t for i in range(network.num_inputs)}
        self._outputs = {(t := network.get_output(i)).name: t for i in range(network.num_outputs)}
        trt = sys.modules[type(network).__module__]
        self._nodes = self._ordered([self._node(trt, network.get_layer(i)) for i in range(network.num_layers)])
        self._constants: dict[int, torch.Tensor] = {}
        tensors = [*self.inputs.values(), *(tensor for node in self._nodes for tensor in node.outputs)]
        self._declared = {id(tensor): Declaration.of(tensor) for tensor in tensors}
        self.caches = self._find_caches()
        """Cache input -> the output that shares its memory."""

    def _node(self, trt: Any, layer: Any) -> Node:
        kind = layer.type.name
        if kind == "DIST_COLLECTIVE":
            layer.__class__ = trt.IDistCollectiveLayer
        elif kind in KINDS:
            layer.__class__ = getattr(trt, KINDS[kind].layer_class)
        else:
            raise NotEvaluated(f"layer {layer.name} of kind {kind}")
        inputs = tuple(layer.get_input(i) for i in range(layer.num_inputs))
        return Node(layer, kind, inputs, tuple(layer.get_output(i) for i in range(layer.num_outputs)))

    def _ordered(self, nodes: list[Node]) -> list[Node]:
        known, ordered = {id(tensor) for tensor in self.inputs.values()}, []
        while nodes:
            later = []
            for node in nodes:
                if all(t is None or id(t) in known for t in node.inputs):
                    ordered.append(node)
                    known |= {id(t) for t in node.outputs}
                else:
                    later.append(node)
            if len(later) == len(nodes):
                raise NotEvaluated(f"layers {[n.layer.name for n in nodes[:4]]} depend on tensors nobody computes")
            nodes = later
        return ordered

    def _find_caches(self) -> dict[str, str]:
        names = {id(tensor): name for name, tensor in self._outputs.items()}
        caches = {}
        for node in self._nodes:
            if node.kind == "KV_CACHE_UPDATE":
                cache, updated = node.inputs[0], node.outputs[0]
                if not cache.is_network_input or id(updated) not in names or cache.name in caches:
                    raise NotEvaluated(f"{node.layer.name}: a cache must be one input and one output of the network")
                caches[cache.name] = names[id(updated)]
        return caches

    def walk(self, feeds: Mapping[str, torch.Tensor]) -> Walk:
        """Computes the outputs by name; yields at every collective and goes on with its result."""
        if feeds.keys() != self.inputs.keys():
            raise NotEvaluated(f"inputs are {sorted(feeds)}, the network has {sorted(self.inputs)}")
        values = {id(tensor): self._checked(tensor, feeds[name]) for name, tensor in self.inputs.items()}
        for node in self._nodes:
            inputs = [None if t is None else values[id(t)] for t in node.inputs]
            if node.kind == "DIST_COLLECTIVE":
                if self._log is None:
                    raise NotEvaluated(f"{node.layer.name}: a collective, and no CollectiveLog")
                assert inputs[0] is not None
                results = [(yield self._log.arguments(node.layer), node.layer.num_ranks, inputs[0])]
            elif node.kind == "CONSTANT":
                results = [self._constant(node)]
            else:
                results = list(KINDS[node.kind].compute(node.layer, inputs))
            for tensor, result in zip(node.outputs, results, strict=True):
                values[id(tensor)] = self._checked(tensor, result)
        return {name: values[id(tensor)] for name, tensor in self._outputs.items()}

    def _constant(self, node: Node) -> torch.Tensor:
        if id(node) not in self._constants:
            (self._constants[id(node)],) = KINDS["CONSTANT"].compute(node.layer, [])
        return self._constants[id(node)]

    def _checked(self, tensor: Any, value: torch.Tensor) -> torch.Tensor:
        """TensorRT infers type and shape of every tensor: what is computed here must fit them."""
        declared = self._declared[id(tensor)]
        declared.check(value)
        return rounded(value, declared.data_type) if self.declared_types else value
