"""Computes what an `INetworkDefinition` says, on the CPU: its layers, parameters and constants, nothing else.

It knows neither the PT decoder nor the lowering that wrote the network, so that agreement with a reference proves the
definition right where no GPU is. Semantics are those of NVIDIA's documentation and headers; what they leave open, or a
layer or parameter not covered here, raises.
"""

from pt_trtllm.testing.network_evaluator.collectives import CollectiveLog
from pt_trtllm.testing.network_evaluator.values import NotEvaluated
from pt_trtllm.testing.network_evaluator.world import World

__all__ = ["CollectiveLog", "NotEvaluated", "World"]
