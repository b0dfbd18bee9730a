"""What a recorded program is made of. Values are symbols: `buffers.py` gives them memory, `lower.py` makes them run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pt_trtllm.network.graph import AttentionSpec


@dataclass(frozen=True, eq=False)
class Value:
    """Activations [tracks, tokens, width], or [tokens, width] before the tracks part and after they met."""

    tracks: int | None
    width: int
    repeats: Value | None = None
    """The one value that all these tracks share."""

    @property
    def owner(self) -> Value:
        """Whose memory it is."""
        return self if self.repeats is None else self.repeats


@dataclass(frozen=True)
class Op:
    inputs: tuple[Value, ...]
    out: Value | None


@dataclass(frozen=True)
class Embed(Op):
    weight: str


@dataclass(frozen=True)
class Linear(Op):
    """`up`: silu(x @ weight^T) * (x @ up^T) instead."""

    weight: str
    bias: str | None = None
    up: str | None = None


@dataclass(frozen=True)
class RmsNorm(Op):
    weight: str | None
    eps: float
    pre_scale: bool


@dataclass(frozen=True)
class Add(Op):
    pass


@dataclass(frozen=True)
class QkNormRope(Op):
    """In place on a fused projection."""

    spec: AttentionSpec
    norm: str | None
    """None, "before_rope" or "after_rope" """
    weights: tuple[str | None, str | None]
    eps: float
    rope: bool


@dataclass(frozen=True)
class Attend(Op):
    """Of a fused projection whose queries and keys are ready."""

    spec: AttentionSpec


@dataclass(frozen=True)
class Call(Op):
    """An operation of the PyTorch lowering, by its name in `Graph`: collectives, and what has no kernel here."""

    name: str
    arguments: tuple[Any, ...] = ()
