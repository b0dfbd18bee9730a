"""The operations a PT decoder is made of. Each engine is one implementation (a lowering) of this protocol.

A lowering may compute at once (PyTorch) or record layers for a builder (TensorRT); `T` is whatever it passes around.
Names of weights are those of `checkpoint.spec`. Shapes below are per rank: `tracks` is the number of local tracks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's attention needs beyond its inputs."""

    layer_idx: int
    num_heads: int
    """Query heads per track on this rank."""
    num_kv_heads: int
    head_dim: int
    window: int | None
    """Tokens before the current one that are seen; None means all."""


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """A sparse feed-forward: each track has its own router and experts; no token is dropped."""

    router: str
    up_gate: str
    """[experts, 2 * width, hidden]: the up projection, then the gate that goes through SiLU."""
    down: str
    experts_per_token: int
    logits_cap: float | None


class Graph(Protocol[T]):
    def embedding(self, weight: str) -> T:
        """The step's token ids to [tokens, hidden]."""
        ...

    def dispatch(self, hidden: T) -> T:
        """[tokens, hidden] to every local track: [tracks, tokens, hidden]."""
        ...

    def rms_norm(self, x: T, weight: str | None, *, eps: float, pre_scale: bool = False) -> T:
        """Normalises the last axis in float32. `pre_scale` multiplies by the weight before, not after."""
        ...

    def linear(self, x: T, weight: str) -> T:
        """[tracks, tokens, in] to [tracks, tokens, out], each track with its own weight."""
        ...

    def add_bias(self, x: T, bias: str) -> T: ...

    def add(self, x: T, y: T) -> T: ...

    def split_heads(self, qkv: T, spec: AttentionSpec) -> tuple[T, T, T]:
        """[tracks, tokens, q + k + v] to three [tracks, tokens, heads, head_dim]."""
        ...

    def rope(self, x: T) -> T:
        """Rotates [tracks, tokens, heads, head_dim] by the tokens' positions."""
        ...

    def attention(self, query: T, key: T, value: T, spec: AttentionSpec) -> T:
        """Appends key and value to the cache and attends causally: [tracks, tokens, heads * head_dim]."""
        ...

    def swiglu(self, gate: T, up: T) -> T:
        """silu(gate) * up."""
        ...

    def moe(self, x: T, spec: MoeSpec) -> T: ...

    def all_reduce(self, x: T) -> T:
        """Sums partial results over the ranks that share a track."""
        ...

    def track_fusion(self, x: T, base: T, op: str) -> T:
        """Mean or sum over all tracks of all ranks: [tracks, tokens, hidden] to [tokens, hidden].

        `base` [tokens, hidden] is what the segment began with, the same on all ranks: x may be sent relative to it.
        """
        ...

    def logits(self, hidden: T, weight: str) -> T:
        """The output projection of the tokens that need logits, over the whole vocabulary."""
        ...
