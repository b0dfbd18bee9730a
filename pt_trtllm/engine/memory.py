"""Memory of one rank, counted before anything is built: weights exactly, the KV cache exactly, the rest estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pt_trtllm.checkpoint.quantize import stored_parts
from pt_trtllm.checkpoint.rank_files import CheckpointConfig, rank_shape, rank_specs
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.mapping import Mapping

RUNTIME_BYTES = 1536 << 20
"""CUDA context, kernels, NCCL buffers and allocator slack: what engines of this kind have been seen to take."""
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    weights: int
    kv_cache: int
    """Every sequence at its longest."""
    activations: int
    """An estimate: the largest layer's inputs, outputs and intermediate values, for the largest step."""
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime


def available_bytes() -> int:
    """Of this host, without swapping: free, or holding nothing but copies of files."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def weight_bytes(checkpoint: CheckpointConfig) -> int:
    """Of the largest rank: all ranks hold the same shapes."""
    mapping, total = checkpoint.mapping, 0
    for spec in rank_specs(checkpoint):
        tracks = mapping.tracks_per_rank if spec.per_track else 1
        for part in stored_parts(spec, checkpoint.torch_dtype, checkpoint.quantization):
            total += tracks * math.prod(rank_shape(spec, part, mapping)) * part.dtype.itemsize
    return total


def kv_cache_bytes(checkpoint: CheckpointConfig, limits: BuildLimits, capacity: int) -> int:
    """`capacity`: positions that the cache of one sequence has."""
    model, mapping = checkpoint.model, checkpoint.mapping
    heads = mapping.tracks_per_rank * mapping.kv_heads_per_rank(model.num_kv_heads)
    positions = limits.max_batch_size * capacity
    return 2 * model.num_hidden_layers * heads * positions * model.head_dim * checkpoint.torch_dtype.itemsize


def activation_bytes(
    checkpoint: CheckpointConfig, limits: BuildLimits, capacity: int, *, context_logits: bool = False
) -> int:
    """The larger of a layer's peak and the logits' for one step of `max_num_tokens` tokens."""
    model, mapping, itemsize = checkpoint.model, checkpoint.mapping, checkpoint.torch_dtype.itemsize
    tokens = max(min(limits.max_num_tokens, limits.max_seq_len), limits.max_batch_size)
    stream = mapping.tracks_per_rank * tokens * model.hidden_size * (3 * itemsize + FLOAT_BYTES)
    kinds = {model.feed_forward_kind(index) for index in range(model.num_hidden_layers)}
    blocks = [_attention_bytes(model, mapping, tokens, capacity, itemsize)]
    if "dense" in kinds:
        width = (model.intermediate_size or 0) // mapping.tp_size
        blocks.append(mapping.tracks_per_rank * tokens * 3 * width * itemsize)
    if "sparse" in kinds:
        blocks.append(_moe_bytes(model, mapping, tokens, itemsize))
    rows = max(tokens if context_logits else 1, limits.max_batch_size)
    copies = 1 if mapping.world_size == 1 else 3  # gathered by rank, then put side by side
    return stream + max(*blocks, copies * rows * model.vocab_size * FLOAT_BYTES)


def _attention_bytes(model: ModelConfig, mapping: Mapping, tokens: int, capacity: int, itemsize: int) -> int:
    heads = model.num_attention_heads // mapping.tp_size + 2 * mapping.kv_heads_per_rank(model.num_kv_heads)
    values = mapping.tracks_per_rank * tokens * heads * model.head_dim * (2 * itemsize + FLOAT_BYTES)
    has_window = any(model.window(index) is not None for index in range(model.num_hidden_layers))
    return values + (tokens * capacity * (1 + FLOAT_BYTES) if has_window else 0)


def _moe_bytes(model: ModelConfig, mapping: Mapping, tokens: int, itemsize: int) -> int:
    """Experts that are gathered, and every token's values in each of them."""
    experts = min(tokens * model.num_experts_per_tok, model.num_experts)
    width = (model.moe_intermediate_size or 0) // mapping.tp_size
    gathered = experts * 3 * width * model.hidden_size * itemsize
    values = experts * tokens * (3 * width + model.hidden_size) * itemsize
    return mapping.tracks_per_rank * (gathered + values)
