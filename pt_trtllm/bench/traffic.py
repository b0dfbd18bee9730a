"""What one decode step must read, from the files of an engine: weights of all ranks, keys and values of the past."""

from __future__ import annotations

from pathlib import Path

from pt_trtllm.checkpoint.rank_files import rank_specs
from pt_trtllm.checkpoint.safetensors_io import read_header
from pt_trtllm.checkpoint.spec import EMBEDDING, OUTPUT_PROJECTION, model_tensors
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import EngineConfig, engine_file


def num_parameters(model: ModelConfig) -> int:
    """Of all tracks; a tied head counts once."""
    specs = model_tensors(model, separate_head=not model.tie_word_embeddings)
    return sum(spec.rows * spec.columns * (model.num_tracks if spec.per_track else 1) for spec in specs)


def layer_flop_per_token(model: ModelConfig) -> int:
    """Of the matrix products of all layers; of experts, of those that a token chooses."""
    total = 0.0
    for spec in model_tensors(model, separate_head=False):
        if spec.name != EMBEDDING and len(spec.shape) > 1:
            chosen = model.num_experts_per_tok / model.num_experts if len(spec.shape) == 3 and model.num_experts else 1
            total += 2 * spec.rows * spec.columns * (model.num_tracks if spec.per_track else 1) * chosen
    return round(total)


def weight_bytes_per_step(engine_dir: Path, config: EngineConfig, batch: int) -> int:
    """Bytes of weights that all ranks together read in a step of `batch` tokens.

    Of the embedding only single rows are looked up, unless it is the head as well. Of experts, at most those count
    that `batch` tokens choose.
    """
    model, mapping = config.checkpoint.model, config.mapping
    share = min(1.0, batch * model.num_experts_per_tok / model.num_experts) if model.num_experts else 1.0
    experts = tuple(f"{_base(spec.name)}." for spec in rank_specs(config.checkpoint) if len(spec.shape) == 3)
    total = 0.0
    for rank in range(mapping.world_size):
        tensors, _ = read_header(engine_dir / engine_file(rank))
        has_head = any(name.startswith(f"{_base(OUTPUT_PROJECTION)}.") for name in tensors)
        for name, info in tensors.items():
            if name.startswith(f"{_base(EMBEDDING)}."):
                shard = len(mapping.for_rank(rank).vocab_shard(model.vocab_size)) / model.vocab_size
                total += 0 if has_head else info.num_bytes * min(1.0, shard)
            else:
                total += info.num_bytes * (share if experts and name.startswith(experts) else 1.0)
    return round(total)


def kv_bytes_per_step(config: EngineConfig, batch: int, context: float) -> int:
    """Keys and values of `context` past tokens (on average) of every sequence, over all ranks."""
    model, mapping = config.checkpoint.model, config.mapping
    heads = mapping.kv_heads_per_rank(model.num_kv_heads) * mapping.tracks_per_rank * mapping.world_size
    tokens = 0.0
    for layer in range(model.num_hidden_layers):
        window = model.window(layer)
        tokens += context if window is None else min(context, window + 1)
    return round(2 * batch * tokens * heads * model.head_dim * config.checkpoint.torch_dtype.itemsize)


def _base(name: str) -> str:
    return name.removesuffix(".weight")
