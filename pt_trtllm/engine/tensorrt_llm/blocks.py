"""What stock TensorRT-LLM layers lack: norms of other kinds, and what happens to queries and keys before attention."""

from __future__ import annotations

from typing import Any

from tensorrt_llm.functional import cast, concat, rms_norm, shape, split, tanh, unsqueeze
from tensorrt_llm.layers import RmsNorm, RowLinear
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import Parameter

from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.tensorrt_llm.support import rotates_itself

Tensor = Any
Angles = tuple[Tensor, Tensor]
"""cos and sin of every token, float32 [tokens, head_dim / 2]."""


class PreScaleRmsNorm(RmsNorm):  # type: ignore[misc]
    """Multiplies by the weight before it normalises."""

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        return rms_norm(x * self.weight.value, self.normalized_shape, 1, None, self.eps)


def make_norm(model: ModelConfig, kind: str | None, dtype: str) -> Any:
    """None where the model has no norm at this place."""
    if kind is None:
        return None
    norm = PreScaleRmsNorm if kind == "pre_scale_rms_norm" else RmsNorm
    return norm(normalized_shape=model.hidden_size, eps=model.rms_norm_eps, dtype=dtype)


class QueryKeyTransform(Module):  # type: ignore[misc]
    """Takes the place of stock attention's `q_layernorm` or `k_layernorm`: rotation and norm in the model's order.

    Called with [tokens, heads, head_dim]; computes in float32.
    """

    angles: Angles | None = None
    """Set by the layer before its attention runs."""

    def __init__(self, model: ModelConfig, layer_idx: int, dtype: str) -> None:
        super().__init__()
        self._model, self._rotates = model, rotates_itself(model, layer_idx)
        self._dtype = dtype
        if model.qk_norm == "scaled":
            self.weight = Parameter(shape=(model.head_dim,), dtype=dtype)
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        y = cast(x, "float32")
        if self._model.qk_norm_position == "before_rope":
            y = self._norm(y)
        if self._rotates:
            y = self._rotate(y)
        if self._model.qk_norm_position == "after_rope":
            y = self._norm(y)
        return cast(y, self._dtype)

    def _norm(self, x: Tensor) -> Tensor:
        if self._model.qk_norm == "none":
            return x
        weight = None if self.weight is None else cast(self.weight.value, "float32")
        return rms_norm(x, (self._model.head_dim,), 1, weight, self._model.rms_norm_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        """Pairs of features are neighbours, or lie half a head apart."""
        assert self.angles is not None
        cos, sin = (unsqueeze(table, 1) for table in self.angles)
        half = self._model.head_dim // 2
        if self._model.rope_style == "half":
            first, second = split(x, half, dim=2)
            return concat([first * cos - second * sin, second * cos + first * sin], dim=2)
        tokens, heads = shape(x, 0), shape(x, 1)
        first, second = split(x.view(concat([tokens, heads, half, 2])), 1, dim=3)
        cos, sin = unsqueeze(cos, 3), unsqueeze(sin, 3)
        pairs = concat([first * cos - second * sin, second * cos + first * sin], dim=3)
        return pairs.view(concat([tokens, heads, 2 * half]))


class CappedRouter(RowLinear):  # type: ignore[misc]
    """Takes the place of a mixture's router: logits are capped to cap * tanh(logits / cap)."""

    cap: float

    def forward(self, x: Tensor, lora_runtime_params: Any = None) -> Tensor:
        logits = super().forward(x, lora_runtime_params)
        return tanh(logits * (1.0 / self.cap)) * self.cap
