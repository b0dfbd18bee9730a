"""Norms and residual streams of a track, in vLLM's way: it adds and normalises in one, in place."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

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


def joined(stream: Stream, y: torch.Tensor, pre_residual: nn.Module | None, post: nn.Module | None) -> Stream:
    """The stream with a sub-layer's output: added at once only where a norm of the sum follows."""
    x = settle(stream)
    y = y if pre_residual is None else pre_residual(y)
    return (x, y) if post is None else (post(y, x)[0], None)
