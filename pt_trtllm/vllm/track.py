"""What one track owns: its weights, in vLLM's own linears and norms, under the checkpoint's own names.

`disable_tp`: a track knows its own ranks, vLLM need not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.norms import Stream, joined, make_norm


class Attention(nn.Module):
    """Projections and norms of one track. What calls them is layer.py, for all local tracks at once."""

    def __init__(self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str) -> None:
        super().__init__()
        heads = config.num_attention_heads // mapping.tp_size
        kv_heads = mapping.kv_heads_per_rank(config.num_kv_heads)
        self.head_dim, self.has_norms = config.head_dim, config.qk_norm != "none"
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, config.head_dim, heads, kv_heads, bias=config.attention_bias,
            quant_config=quant_config, disable_tp=True, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias,
            quant_config=quant_config, disable_tp=True, prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        if self.has_norms:
            scaled = config.qk_norm == "scaled"
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, has_weight=scaled)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, has_weight=scaled)

    def normalise(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_norms:
            return query, key
        return self._per_head(self.q_norm, query), self._per_head(self.k_norm, key)

    def _per_head(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = norm(x.reshape(-1, self.head_dim))
        return heads.view(x.shape)


class DenseFeedForward(nn.Module):
    def __init__(self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str) -> None:
        super().__init__()
        width = (config.intermediate_size or 0) // mapping.tp_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width, width], bias=config.mlp_bias,
            quant_config=quant_config, disable_tp=True, prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            width, config.hidden_size, bias=config.mlp_bias,
            quant_config=quant_config, disable_tp=True, prefix=f"{prefix}.down_proj",
        )  # fmt: skip


class TrackLayer(nn.Module):
    """What one track brings to one layer: weights, and the parts of the layer that are its own."""

    def __init__(
        self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str, track_idx: int, layer_idx: int
    ) -> None:
        super().__init__()

        def norm(kind: str | None) -> nn.Module | None:
            return make_norm(kind, config.hidden_size, config.rms_norm_eps)

        self.input_layernorm = norm(config.pre_norm)
        self.self_attn = Attention(config, mapping, quant_config, f"{prefix}.self_attn")
        self.attention_pre_residual_norm = norm(config.pre_residual_norm)
        self.attention_post_norm = norm(config.post_norm)
        self.post_attention_layernorm = norm(config.pre_norm)
        self.mlp = self._feed_forward(config, mapping, quant_config, f"{prefix}.mlp", track_idx, layer_idx)
        self.mlp_pre_residual_norm = norm(config.pre_residual_norm)
        self.mlp_post_norm = norm(config.post_norm)

    @staticmethod
    def _feed_forward(
        config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str, track_idx: int, layer_idx: int
    ) -> nn.Module:
        if config.feed_forward_kind(layer_idx) == "dense":
            return DenseFeedForward(config, mapping, quant_config, prefix)
        from pt_trtllm.vllm.moe import SparseFeedForward

        # What is before the tracks tells a draft model's experts from those of the model that it drafts for.
        key = prefix.replace(f"tracks.{track_idx}.layers.{layer_idx}.", f"layers.{layer_idx}.track{track_idx}.")
        return SparseFeedForward(config, mapping, quant_config, prefix, key)

    def after_attention(self, stream: Stream, y: torch.Tensor) -> Stream:
        return joined(stream, y, self.attention_pre_residual_norm, self.attention_post_norm)

    def after_feed_forward(self, stream: Stream, y: torch.Tensor) -> Stream:
        return joined(stream, y, self.mlp_pre_residual_norm, self.mlp_post_norm)


class Segment(nn.Module):
    """The norms where a segment begins and ends."""

    dispatch_norm: nn.Module | None
    combine_norm: nn.Module | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dispatch_norm = make_norm(config.dispatch_norm, config.hidden_size, config.rms_norm_eps)
        self.combine_norm = make_norm(config.combine_norm, config.hidden_size, config.rms_norm_eps)


class Track(nn.Module):
    layers: Sequence[TrackLayer]
    segments: Sequence[Segment]

    def __init__(
        self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str, track_idx: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            TrackLayer(config, mapping, quant_config, f"{prefix}.layers.{layer_idx}", track_idx, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        num_segments = config.num_hidden_layers // config.interval
        self.segments = nn.ModuleList(Segment(config) for _ in range(num_segments))  # type: ignore[assignment]
