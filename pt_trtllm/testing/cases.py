"""Small models that together use every option of the reference configuration, and the worlds they are run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 97
"""A prime: no world size divides it, so the padding of the vocabulary is always exercised."""

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_tracks": 4,
    "num_layers_per_track": 4,
    "num_layers_per_track_per_sync_point": 2,
    "hidden_dim": 64,
    "attention_hidden_dim": 64,
    "dense_feed_forward_hidden_dim": 96,
    "sparse_feed_forward_hidden_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_experts": 5,
    "local_attention_window_size": 3,
    "attention_layer_pattern": ["local_rope", "global_nope"],
    "feed_forward_layer_pattern": ["dense", "sparse"],
}


@dataclass(frozen=True)
class Case:
    name: str
    world_sizes: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """What differs from BASE, in the reference's own words."""
    prompt_lengths: tuple[int, ...] = (5, 11, 1)

    @property
    def config(self) -> dict[str, Any]:
        return {**BASE, **self.options}


DENSE = {"feed_forward_layer_pattern": ["dense"]}

OUTGROWING = (5, 75, 1)
"""Prompts, one of them so long that layers with a window give blocks of the KV cache back."""

CASES = (
    Case("mixed_local_global_dense_sparse", (1, 2, 4)),
    Case("fused_after_every_layer", (1, 2, 4), {"num_layers_per_track_per_sync_point": 1, **DENSE}),
    Case("fused_once_at_the_end", (1, 4), {"num_layers_per_track_per_sync_point": 4, "num_kv_heads": None, **DENSE}),
    Case("sum_of_tracks", (1, 2, 4), {"tracks_combine_op": "sum", **DENSE}),
    Case("qk_norm_without_scale", (1, 2), {"scale_qk_norm": False}),
    Case("pre_scale_norms", (1, 4), {"pre_norm": "pre_scale_rms_norm", "tracks_combine_norm": "pre_scale_rms_norm"}),
    Case(
        "pre_residual_and_post_norms", (1, 2, 4), {"pre_residual_norm": "rms_norm", "post_norm": "pre_scale_rms_norm"}
    ),
    Case("post_norm_only", (1, 2), {"pre_norm": None, "post_norm": "rms_norm", **DENSE}),
    Case(
        "dispatch_and_combine_norms",
        (1, 2, 4),
        {"tracks_dispatch_norm": "rms_norm", "tracks_combine_norm": "rms_norm", "tracks_combine_op": "sum"},
    ),
    Case(
        "all_sparse_uncapped_top_3",
        (1, 2, 4),
        {"feed_forward_layer_pattern": ["sparse"], "num_experts_per_token": 3, "experts_router_logits_cap": None},
    ),
    Case("tightly_capped_router_top_1", (1, 4), {"experts_router_logits_cap": 0.5, "num_experts_per_token": 1}),
    Case("one_track_is_tensor_parallel", (1, 2, 4), {"num_tracks": 1, "num_kv_heads": None}),
    Case("two_tracks_split_over_two_ranks_each", (1, 2, 4), {"num_tracks": 2, "pre_residual_norm": "rms_norm"}),
    Case("fewer_kv_heads_than_ranks_per_track", (2, 4), {"num_tracks": 1, "num_kv_heads": 1, **DENSE}),
    Case(
        "three_tracks",
        (1, 3),
        {"num_tracks": 3, "attention_layer_pattern": ["local_rope", "local_rope", "global_nope"]},
        OUTGROWING,
    ),
    Case(
        "six_tracks_two_per_rank", (1, 2, 3), {"num_tracks": 6, "tracks_combine_op": "sum", "norm_eps": 1e-3, **DENSE}
    ),
    Case(
        "one_track_on_three_ranks",
        (3,),
        {
            "num_tracks": 1,
            "num_heads": 6,
            "num_kv_heads": 3,
            "attention_hidden_dim": 96,
            "sparse_feed_forward_hidden_dim": 48,
        },
    ),
    Case(
        "window_of_the_current_token_only", (1, 4), {"local_attention_window_size": 0, "rope_theta": 100.0}, OUTGROWING
    ),
    Case("all_layers_with_a_window", (1, 2), {"attention_layer_pattern": ["local_rope"], **DENSE}, OUTGROWING),
    Case(
        "attention_wider_than_the_residual", (1, 2), {"attention_hidden_dim": 128, "local_attention_window_size": 500}
    ),
)
