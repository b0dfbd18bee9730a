"""Rewrites a reference checkpoint in the project's own `pt` layout, independently of the converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FEED_FORWARD = {
    "gate_proj": "hidden_transform.linear_0",
    "up_proj": "hidden_transform.linear_1",
    "down_proj": "output_transform",
}
NORMS = {
    "input_layernorm": "attention.norm",
    "post_attention_layernorm": "feed_forward.norm",
    "self_attn.q_norm": "attention.qk_norm.query_norm",
    "self_attn.k_norm": "attention.qk_norm.key_norm",
    "attention_pre_residual_norm": "attention.residual_connection.pre_residual_norm",
    "attention_post_norm": "attention.residual_connection.post_norm",
    "mlp_pre_residual_norm": "feed_forward.residual_connection.pre_residual_norm",
    "mlp_post_norm": "feed_forward.residual_connection.post_norm",
}


def write_pt_layout(tamm_folder: Path, folder: Path, num_shards: int = 1) -> None:
    """`config.json` and (sharded) safetensors, every track spelled out like a Llama."""
    config = json.loads((tamm_folder / "config.json").read_text())
    source = load_file(tamm_folder / "model.safetensors")
    interval, head_dim = (
        config["num_layers_per_track_per_sync_point"],
        config["attention_hidden_dim"] // config["num_heads"],
    )
    kv_heads = config["num_kv_heads"] or config["num_heads"]
    heads = [config["num_heads"] * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    tensors = {
        "model.embed_tokens.weight": source["embedding.weight"],
        "model.norm.weight": source["output_norm.weight"],
    }
    for track in range(config["num_tracks"]):
        for layer in range(config["num_layers_per_track"]):
            ours = f"model.tracks.{track}.layers.{layer}."
            theirs = f"layers.segment_{layer // interval}.layer_{layer % interval}."
            qkv = source[theirs + "attention.qkv_transform.fused_linear.weight"][track].t().split(heads)
            for letter, matrix in zip("qkv", qkv, strict=True):
                tensors[f"{ours}self_attn.{letter}_proj.weight"] = matrix
            tensors[f"{ours}self_attn.o_proj.weight"] = source[theirs + "attention.output_transform.weight"][track].t()
            for name, theirs_name in NORMS.items():
                if theirs + theirs_name + ".weight" in source:
                    tensors[f"{ours}{name}.weight"] = source[f"{theirs}{theirs_name}.weight"][track]
            tensors.update(_feed_forward(config, source, ours, theirs + "feed_forward.", track))
        for segment in range(config["num_layers_per_track"] // interval):
            for name, side in (("dispatch_norm", "input_transform"), ("combine_norm", "output_transform")):
                key = f"layers.segment_{segment}.{side}.norm.weight"
                if key in source:
                    tensors[f"model.tracks.{track}.segments.{segment}.{name}.weight"] = source[key][track]
    folder.mkdir(parents=True)
    _save(folder, {name: value.contiguous().clone() for name, value in tensors.items()}, num_shards)
    (folder / "config.json").write_text(json.dumps(_config(config, head_dim, kv_heads)))


def _feed_forward(
    config: dict[str, Any], source: dict[str, torch.Tensor], ours: str, theirs: str, track: int
) -> dict[str, torch.Tensor]:
    if theirs + "router.input_transform.weight" not in source:
        names = FEED_FORWARD.items()
        return {
            f"{ours}mlp.{name}.weight": source[f"{theirs}{their_name}.weight"][track].t() for name, their_name in names
        }
    tensors = {f"{ours}mlp.router.weight": source[theirs + "router.input_transform.weight"][track].t()}
    for expert in range(config["num_experts"]):
        for name, their_name in FEED_FORWARD.items():
            matrix = source[f"{theirs}experts.{their_name}.weight"][track, expert].t()
            tensors[f"{ours}mlp.experts.{expert}.{name}.weight"] = matrix
    return tensors


def _save(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(mine, folder / file)
        weight_map.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _config(config: dict[str, Any], head_dim: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "parallel_track",
        "architectures": ["PTForCausalLM"],
        "dtype": "float32",
        "vocab_size": config["vocab_size"],
        "num_tracks": config["num_tracks"],
        "num_hidden_layers": config["num_layers_per_track"],
        "sync_interval": config["num_layers_per_track_per_sync_point"],
        "hidden_size": config["hidden_dim"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": config["dense_feed_forward_hidden_dim"],
        "moe_intermediate_size": config["sparse_feed_forward_hidden_dim"],
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config.get("num_experts_per_token", 2),
        "router_logits_cap": config.get("experts_router_logits_cap", 50.0),
        "attention_pattern": config["attention_layer_pattern"],
        "attention_window": config["local_attention_window_size"],
        "feed_forward_pattern": config["feed_forward_layer_pattern"],
        "rope_theta": config.get("rope_theta", 500000.0),
        "rope_style": "interleaved",
        "rope_scaling": None,
        "qk_norm": "scaled" if config.get("scale_qk_norm", True) else "unscaled",
        "qk_norm_position": "after_rope",
        "pre_norm": config.get("pre_norm", "rms_norm"),
        "post_norm": config.get("post_norm"),
        "pre_residual_norm": config.get("pre_residual_norm"),
        "dispatch_norm": config.get("tracks_dispatch_norm"),
        "combine_norm": config.get("tracks_combine_norm"),
        "combine_op": config.get("tracks_combine_op", "mean"),
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "tie_word_embeddings": True,
    }
