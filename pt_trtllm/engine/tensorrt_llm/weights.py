"""From a rank's file, as `convert` wrote it, to the parameters of `PTForCausalLM`. Names are already the same."""

from __future__ import annotations

import torch

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.checkpoint.spec import LAYER
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.tensorrt_llm.support import changes_queries_and_keys

Weights = dict[str, torch.Tensor]


def prepare_weights(weights: Weights, config: CheckpointConfig) -> Weights:
    """What TensorRT-LLM's loader expects beyond the checkpoint's names and shapes."""
    model, prepared = config.model, dict(weights)
    kv_heads = config.mapping.kv_heads_per_rank(model.num_kv_heads)
    heads = model.num_attention_heads // config.mapping.tp_size
    for layer_idx in range(model.num_hidden_layers):
        prefix = LAYER.format(layer=layer_idx)
        if heads == kv_heads and changes_queries_and_keys(model, layer_idx):
            for name in (prefix + "attention.qkv.weight", prefix + "attention.qkv.bias"):
                if name in prepared:
                    prepared[name] = _interleave_heads(prepared[name], heads, model)
        router = prefix + "mlp.router.weight"
        if router in prepared:
            prepared[router] = prepared[router].float()  # it routes in float32, whatever the model's type
    return prepared


def _interleave_heads(qkv: torch.Tensor, heads: int, model: ModelConfig) -> torch.Tensor:
    """Stock attention with norms on queries and keys, and as many of one as of the other, reads rows head by head:
    query 0, key 0, value 0, query 1, ... Everywhere else all queries come first, then all keys."""
    interleaved: torch.Tensor = qkv.unflatten(0, (3, heads, model.head_dim)).transpose(0, 1).flatten(0, 2)
    return interleaved.contiguous()
