"""Random weights in folders that vLLM and our own `convert` both read: PT models, and a Llama of equal size."""

from __future__ import annotations

from pathlib import Path

from pt_trtllm.bench.shapes import Shape
from pt_trtllm.checkpoint.artifact import write_json
from pt_trtllm.config import ModelConfig
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint, write_random_weights


def write_parallel_track(folder: Path, shape: Shape, num_tracks: int, sync_interval: int) -> ModelConfig:
    """In the project's own `pt` layout."""
    config = shape.config(num_tracks, sync_interval)
    write_big_checkpoint(folder, 0, config)
    return config


def write_llama(folder: Path, shape: Shape) -> ModelConfig:
    """As Hugging Face lays it out: one track, whose layers are as wide as those of all tracks together."""
    config = shape.config(1, None)
    folder.mkdir(parents=True)
    write_random_weights(folder / "model.safetensors", config, named=lambda name: name.replace("tracks.0.", ""))
    write_json(folder / "config.json", llama_config(config))
    return config


def llama_config(config: ModelConfig) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
