"""The reference implementation's format: `AFMParallelTrackMoEConfig` as JSON and its state dict.

Weights carry leading [tracks] (and [experts]) axes and are stored [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.artifact import read_json
from pt_trtllm.checkpoint.sources.base import Part, Source, SourceLayout, head_differs, open_store
from pt_trtllm.checkpoint.spec import EMBEDDING, OUTPUT_NORM, OUTPUT_PROJECTION, TensorSpec, model_tensors
from pt_trtllm.config import ModelConfig, reject_unknown_keys
from pt_trtllm.errors import ConfigError

# Defaults of the reference: it writes only the fields that differ from them.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 153600,
    "num_tracks": 8,
    "num_layers_per_track": 48,
    "num_layers_per_track_per_sync_point": 4,
    "hidden_dim": 2048,
    "attention_hidden_dim": 512,
    "dense_feed_forward_hidden_dim": 5888,
    "sparse_feed_forward_hidden_dim": 2944,
    "num_heads": 4,
    "num_kv_heads": None,
    "rope_theta": 500000.0,
    "attention_layer_pattern": ["local_rope", "local_rope", "local_rope", "global_nope"],
    "local_attention_window_size": 4096,
    "feed_forward_layer_pattern": ["dense", "sparse"],
    "num_experts": 40,
    "num_experts_per_token": 2,
    "experts_router_logits_cap": 50.0,
    "pre_norm": "rms_norm",
    "post_norm": None,
    "pre_residual_norm": None,
    "tracks_dispatch_norm": None,
    "tracks_combine_norm": None,
    "scale_qk_norm": True,
    "norm_eps": 1e-5,
    "tracks_combine_op": "mean",
}
NOT_FOR_INFERENCE = {
    "__tamm_type__", "sdpa_implementation", "hidden_dropout_p", "attention_dropout_p", "output_hidden_states",
    "output_attentions", "output_expert_assignments", "pretrained", "pretrained_path", "dtype", "device", "metadata",
    "arch_optimizers", "adapters", "active_adapter", "freeze_params", "context_hooks", "post_hooks",
    "model_type", "architectures",
}  # fmt: skip

OPTIONAL = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Not the reference's own, but welcome in its config.json."""

# Logical name within a layer -> name within the reference's layer. Anchored: the whole name must match.
LAYER_NAMES = {
    "input_layernorm.weight": "attention.norm.weight",
    "attention.qkv.weight": "attention.qkv_transform.fused_linear.weight",
    "attention.q_layernorm.weight": "attention.qk_norm.query_norm.weight",
    "attention.k_layernorm.weight": "attention.qk_norm.key_norm.weight",
    "attention.dense.weight": "attention.output_transform.weight",
    "attention_pre_residual_layernorm.weight": "attention.residual_connection.pre_residual_norm.weight",
    "attention_post_residual_layernorm.weight": "attention.residual_connection.post_norm.weight",
    "post_layernorm.weight": "feed_forward.norm.weight",
    "mlp.fc.weight": "feed_forward.hidden_transform.linear_0.weight",
    "mlp.gate.weight": "feed_forward.hidden_transform.linear_1.weight",
    "mlp.proj.weight": "feed_forward.output_transform.weight",
    "mlp.router.weight": "feed_forward.router.input_transform.weight",
    "mlp_pre_residual_layernorm.weight": "feed_forward.residual_connection.pre_residual_norm.weight",
    "mlp_post_residual_layernorm.weight": "feed_forward.residual_connection.post_norm.weight",
}
EXPERT_NAMES = {
    "up": "feed_forward.experts.hidden_transform.linear_1.weight",
    "gate": "feed_forward.experts.hidden_transform.linear_0.weight",
    "down": "feed_forward.experts.output_transform.weight",
}
TOP_NAMES = {
    EMBEDDING: "embedding.weight",
    OUTPUT_NORM: "output_norm.weight",
    OUTPUT_PROJECTION: "output_transform.weight",
}


def recognises(config: dict[str, Any]) -> bool:
    return "num_layers_per_track" in config or "AFMParallelTrackMoEConfig" in str(config.get("__tamm_type__", ""))


def open_source(folder: Path) -> Source:
    raw = read_json(folder / "config.json", "the fields of AFMParallelTrackMoEConfig")
    reject_unknown_keys(f"{folder / 'config.json'}", raw, {*DEFAULTS, *NOT_FOR_INFERENCE, *OPTIONAL})
    config = to_model_config(raw)
    store = open_store(folder)
    separate_head = head_differs(store, TOP_NAMES[EMBEDDING], TOP_NAMES[OUTPUT_PROJECTION])
    config = ModelConfig.from_dict({**config.to_dict(), "tie_word_embeddings": not separate_head})
    layout = SourceLayout(
        config=config,
        separate_head=separate_head,
        locate=lambda spec, track_idx: locate(config, spec, track_idx),
        leading_sizes=lambda name: leading_sizes(config, name),
        ignored=lambda name: name == TOP_NAMES[OUTPUT_PROJECTION],
    )
    return Source(folder, layout, store, model_tensors(config, separate_head=separate_head))


def to_model_config(raw: dict[str, Any]) -> ModelConfig:
    values = {**DEFAULTS, **{key: value for key, value in raw.items() if key in DEFAULTS}}
    if not isinstance(values["num_heads"], int) or values["num_heads"] < 1:
        raise ConfigError(f"num_heads is {values['num_heads']!r}, expected a positive whole number")
    if not isinstance(values["attention_hidden_dim"], int) or values["attention_hidden_dim"] % values["num_heads"]:
        raise ConfigError(
            f"num_heads {values['num_heads']} does not divide attention_hidden_dim {values['attention_hidden_dim']}"
        )
    patterns = [values["attention_layer_pattern"], values["feed_forward_layer_pattern"]]
    if not all(isinstance(pattern, (list, tuple)) for pattern in patterns):
        raise ConfigError(f"attention_layer_pattern and feed_forward_layer_pattern are {patterns!r}, expected lists")
    return ModelConfig.from_dict(
        {
            "vocab_size": values["vocab_size"],
            "num_tracks": values["num_tracks"],
            "num_hidden_layers": values["num_layers_per_track"],
            "sync_interval": values["num_layers_per_track_per_sync_point"],
            "hidden_size": values["hidden_dim"],
            "num_attention_heads": values["num_heads"],
            "num_key_value_heads": values["num_kv_heads"],
            "head_dim": values["attention_hidden_dim"] // values["num_heads"],
            "intermediate_size": values["dense_feed_forward_hidden_dim"],
            "moe_intermediate_size": values["sparse_feed_forward_hidden_dim"],
            "num_experts": values["num_experts"],
            "num_experts_per_tok": values["num_experts_per_token"],
            "router_logits_cap": values["experts_router_logits_cap"],
            "attention_pattern": ["local_rope" if kind == "local" else kind for kind in patterns[0]],
            "attention_window": values["local_attention_window_size"],
            "feed_forward_pattern": patterns[1],
            "rope_theta": values["rope_theta"],
            "rope_style": "interleaved",
            "qk_norm": "scaled" if values["scale_qk_norm"] else "unscaled",
            "qk_norm_position": "after_rope",
            "pre_norm": values["pre_norm"],
            "post_norm": values["post_norm"],
            "pre_residual_norm": values["pre_residual_norm"],
            "dispatch_norm": values["tracks_dispatch_norm"],
            "combine_norm": values["tracks_combine_norm"],
            "combine_op": str(values["tracks_combine_op"]).lower(),
            "rms_norm_eps": values["norm_eps"],
            "tie_word_embeddings": True,
            **{key: raw[key] for key in OPTIONAL if key in raw},
        }
    )  # fmt: skip


def locate(config: ModelConfig, spec: TensorSpec, track_idx: int) -> Sequence[Part]:
    if spec.name in TOP_NAMES:
        return [Part(TOP_NAMES[spec.name], spec.rows)]
    layer_idx, name = split_layer_name(spec.name)
    segment = f"layers.segment_{layer_idx // config.interval}."
    if name == "dispatch_layernorm.weight":
        return [Part(segment + "input_transform.norm.weight", spec.rows, (track_idx,))]
    if name == "combine_layernorm.weight":
        return [Part(segment + "output_transform.norm.weight", spec.rows, (track_idx,))]
    prefix = f"{segment}layer_{layer_idx % config.interval}."
    if config.feed_forward_kind(layer_idx) == "sparse" and name in ("mlp.fc.weight", "mlp.proj.weight"):
        halves = ("up", "gate") if name == "mlp.fc.weight" else ("down",)
        return [
            Part(prefix + EXPERT_NAMES[half], spec.shape[1] // len(halves), (track_idx, expert), transposed=True)
            for expert in range(config.num_experts)
            for half in halves
        ]
    return [Part(prefix + LAYER_NAMES[name], spec.rows, (track_idx,), transposed=len(spec.shape) > 1)]


def leading_sizes(config: ModelConfig, source_name: str) -> tuple[int, ...]:
    if source_name in TOP_NAMES.values():
        return ()
    return (config.num_tracks, config.num_experts) if ".experts." in source_name else (config.num_tracks,)


def split_layer_name(name: str) -> tuple[int, str]:
    match = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", name)
    assert match, name
    return int(match[1]), match[2]
