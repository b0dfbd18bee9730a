"""One track's layer in vLLM's own linears and norms. `disable_tp`: a track knows its own ranks, vLLM need not."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping

Stream = tuple[torch.Tensor, torch.Tensor | None]
"""A track's residual stream [tokens, hidden], and what is still to be added to it: vLLM adds and normalises in one."""


class PreScaleRMSNorm(nn.Module):
    """Multiplies by the weight before it normalises. vLLM has no such layer."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else x + residual
        scaled = total.float() * self.weight.float()
        normed = (scaled * torch.rsqrt(scaled.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)
        return normed if residual is None else (normed, total)


def make_norm(kind: str | None, size: int, eps: float) -> nn.Module | None:
    """Called with x alone: its norm. With a residual: the norm of the sum, and the sum."""
    if kind is None:
        return None
    norm: nn.Module = PreScaleRMSNorm(size, eps) if kind == "pre_scale_rms_norm" else RMSNorm(size, eps=eps)
    return norm


def settle(stream: Stream) -> torch.Tensor:
    x, pending = stream
    return x if pending is None else x + pending


def normed(norm: nn.Module | None, stream: Stream) -> tuple[torch.Tensor, Stream]:
    """The norm of a stream (or the stream itself), and the stream settled."""
    x, pending = stream
    if norm is None or pending is None:
        x = settle(stream)
        return x if norm is None else norm(x), (x, None)
    y, x = norm(pending, x)
    return y, (x, None)


class Attention(nn.Module):
    """Projections of one track. Attention itself is computed for all local tracks at once (model.py)."""

    def __init__(self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str) -> None:
        super().__init__()
        heads = config.num_attention_heads // mapping.tp_size
        kv_heads = mapping.kv_heads_per_rank(config.num_kv_heads)
        self.sizes = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
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

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value [tokens, heads * head_dim]."""
        return self.qkv_proj(x)[0].split(self.sizes, dim=-1)  # type: ignore[no-any-return]

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
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.activation(self.gate_up_proj(x)[0]))[0]
        return y


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

        key = f"model.layers.{layer_idx}.track{track_idx}.mlp"
        return SparseFeedForward(config, mapping, quant_config, prefix, key)

    def after_attention(self, stream: Stream, y: torch.Tensor) -> Stream:
        return joined(stream, y, self.attention_pre_residual_norm, self.attention_post_norm)

    def after_feed_forward(self, stream: Stream, y: torch.Tensor) -> Stream:
        return joined(stream, y, self.mlp_pre_residual_norm, self.mlp_post_norm)


def joined(stream: Stream, y: torch.Tensor, pre_residual: nn.Module | None, post: nn.Module | None) -> Stream:
    """The stream with a sub-layer's output: added at once only where a norm of the sum follows."""
    x = settle(stream)
    y = y if pre_residual is None else pre_residual(y)
    return (x, y) if post is None else (post(y, x)[0], None)
