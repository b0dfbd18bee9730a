"""One rank's `INetworkDefinition`: `pt_decoder` over the lowering, with the inputs and outputs of `bindings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.engine.tensorrt.bindings import Binding, bindings, cache_capacity
from pt_trtllm.engine.tensorrt.layers import Layers
from pt_trtllm.engine.tensorrt.library import Library
from pt_trtllm.engine.tensorrt.lowering import TensorrtGraph
from pt_trtllm.engine.tensorrt.weights import MappedWeights
from pt_trtllm.network.decoder import pt_decoder
from pt_trtllm.network.rope import rope_tables


@dataclass(frozen=True, kw_only=True)
class RankNetwork:
    """A network, its bindings, and the owners of the memory that its constants point to."""

    network: Any
    bindings: list[Binding]
    keep: list[Any] = field(default_factory=list)


def build_network(
    builder: Any, library: Library, config: EngineConfig, weights: MappedWeights, rank: int, *, context_logits: bool
) -> RankNetwork:
    """Adds everything to a new, strongly typed network of `builder`. Keep the result until the engine is built.

    Names, types and shapes of inputs and outputs: see `bindings`. Constants carry the names of their weights.
    Collectives are named `collective_{i}_{kind}` in the order of `sync_plan`.
    """
    model, mapping, dtype = config.checkpoint.model, config.mapping.for_rank(rank), config.checkpoint.torch_dtype
    flag = library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    network.name = f"pt_decoder_rank{rank}"
    table = bindings(model, mapping, config.limits, config.checkpoint.dtype, context_logits=context_logits)
    layers = Layers(library, network)
    inputs = {
        binding.name: network.add_input(
            binding.name, getattr(library.module, binding.dtype), library.module.Dims(list(binding.shape))
        )
        for binding in table
        if binding.is_input
    }
    rope = rope_tables(model, cache_capacity(config.limits))
    graph = TensorrtGraph(layers, inputs, weights, model, mapping, dtype, rope)
    outputs = {"logits": pt_decoder(graph, model, mapping), **graph.attention.outputs}
    for binding in table:
        if not binding.is_input:
            outputs[binding.name].name = binding.name
            network.mark_output(outputs[binding.name])
    return RankNetwork(network=network, bindings=table, keep=[builder, weights, layers])
