"""`tensorrt_llm.layers` and `tensorrt_llm.mapping`"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pt_trtllm.testing.trtllm_recorder.functional import (
    AllReduceParams,
    AttentionMaskType,
    PositionEmbeddingType,
    allgather,
    allreduce,
    cast,
    concat,
    embedding,
    rms_norm,
    shape,
    split,
)
from pt_trtllm.testing.trtllm_recorder.module import Module, Parameter
from pt_trtllm.testing.trtllm_recorder.network import Tensor, record


class Mapping:
    def __init__(self, world_size: int = 1, rank: int = 0, tp_size: int = 1, pp_size: int = 1) -> None:
        if world_size != tp_size * pp_size or pp_size != 1:
            raise ValueError(f"world of {world_size} ranks, tp_size {tp_size}, pp_size {pp_size}")
        self.world_size, self.rank, self.tp_size = world_size, rank, tp_size

    @property
    def tp_group(self) -> list[int]:
        return list(range(self.tp_size))

    def pp_layers(self, num_layers: int) -> list[int]:
        return list(range(num_layers))


class RmsNorm(Module):
    def __init__(self, normalized_shape: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (normalized_shape,), eps
        self.weight = Parameter(shape=self.normalized_shape, dtype=dtype)

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        return rms_norm(x, self.normalized_shape, 1, self.weight.value, self.eps)


class Embedding(Module):
    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: str) -> None:
        super().__init__()
        self.weight = Parameter(shape=(num_embeddings, embedding_dim), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return embedding(x, self.weight.value)


class _Linear(Module):
    """Sizes are global; rows or columns of this rank are held."""

    def __init__(self, rows: int, columns: int, bias_rows: int, bias: bool, dtype: str) -> None:
        super().__init__()
        self.weight = Parameter(shape=(rows, columns), dtype=dtype)
        self.bias = Parameter(shape=(bias_rows,), dtype=dtype) if bias else None

    def product(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            raise TypeError(f"product of {x.dtype} with a weight of {self.weight.dtype} in a strongly typed network")
        return record("linear", (x, self.weight.value), x.dtype, x.ndim())

    def with_bias(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias.value


class ColumnLinear(_Linear):
    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: str, tp_group: list[int] | None, tp_size: int,
        gather_output: bool,
    ) -> None:  # fmt: skip
        super().__init__(out_features // tp_size, in_features, out_features // tp_size, bias, dtype)
        self._gathers = tp_group if gather_output and tp_size > 1 else None

    def forward(self, x: Tensor, lora_runtime_params: None = None) -> Tensor:
        y = self.with_bias(self.product(x))
        return y if self._gathers is None else allgather(y, self._gathers, gather_dim=1)


class RowLinear(_Linear):
    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: str, tp_group: list[int] | None, tp_size: int,
        strict_dtype: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(out_features, in_features // tp_size, out_features, bias, dtype)
        self._group = tp_group if tp_size > 1 else None

    def forward(
        self, x: Tensor, lora_runtime_params: None = None, all_reduce_params: AllReduceParams | None = None
    ) -> Tensor:
        y = self.product(x)
        if self._group is not None:
            y = allreduce(y, self._group, all_reduce_params)
        return self.with_bias(y)


class GatedMLP(Module):
    """The activation is applied to `fc`, not to `gate`."""

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, hidden_act: str, bias: bool, dtype: str,
        tp_group: list[int] | None, tp_size: int, quant_mode: int,
    ) -> None:  # fmt: skip
        super().__init__()
        assert hidden_act == "silu", hidden_act
        wide = (hidden_size, ffn_hidden_size, bias, dtype, tp_group, tp_size, False)
        self.fc, self.gate = ColumnLinear(*wide), ColumnLinear(*wide)
        self.proj = RowLinear(ffn_hidden_size, hidden_size, bias, dtype, tp_group, tp_size)

    def forward(
        self, hidden_states: Tensor, lora_layer_params: None = None, all_reduce_params: AllReduceParams | None = None
    ) -> Tensor:
        active = self.fc(hidden_states)
        active = record("silu", (active,), active.dtype, active.ndim())
        y: Tensor = self.proj(active * self.gate(hidden_states), all_reduce_params=all_reduce_params)
        return y


@dataclass
class MoeConfig:
    class ExpertScaleNormalizationMode(IntEnum):
        NONE = 0
        RENORMALIZE = 1

    num_experts: int
    top_k: int
    normalization_mode: int


class _ExpertWeights(Module):
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__()
        self.weight = Parameter(shape=shape, dtype=dtype)


class MOE(Module):
    """Routes in float32. Of `fc`'s rows per expert the first half is linear, the second goes through SiLU."""

    def __init__(
        self, moe_config: MoeConfig, hidden_size: int, ffn_hidden_size: int, hidden_act: str, mapping: Mapping,
        bias: bool, dtype: str, tp_group: list[int] | None, tp_size: int, quant_mode: int, use_all_reduce: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        assert hidden_act == "swiglu", hidden_act
        assert not bias
        assert moe_config.normalization_mode == MoeConfig.ExpertScaleNormalizationMode.RENORMALIZE
        self._top_k = moe_config.top_k
        width = ffn_hidden_size // mapping.tp_size
        self.router = RowLinear(hidden_size, moe_config.num_experts, False, "float32", None, 1, strict_dtype=True)
        self.fc = _ExpertWeights((moe_config.num_experts, 2 * width, hidden_size), dtype)
        self.proj = _ExpertWeights((moe_config.num_experts, hidden_size, width), dtype)
        self._group = tp_group if use_all_reduce and tp_size > 1 else None

    def forward(
        self, hidden_states: Tensor, lora_layer_params: None = None, all_reduce_params: AllReduceParams | None = None
    ) -> Tensor:
        logits = self.router(cast(hidden_states, "float32"), None)
        y = record(
            "experts", (hidden_states, logits, self.fc.weight.value, self.proj.weight.value), hidden_states.dtype,
            hidden_states.ndim(), top_k=self._top_k,
        )  # fmt: skip
        return y if self._group is None else allreduce(y, self._group, all_reduce_params)


class Attention(Module):
    """Packed tokens [tokens, hidden]; the attention plugin keeps the cache, rotates, and applies the run's windows."""

    def __init__(
        self, *, local_layer_idx: int, hidden_size: int, num_attention_heads: int, num_kv_heads: int,
        max_position_embeddings: int, num_layers: int, attention_head_size: int, qk_layernorm: bool,
        attention_mask_type: AttentionMaskType, bias: bool, dense_bias: bool, dtype: str,
        position_embedding_type: PositionEmbeddingType, rotary_embedding_base: float, tp_group: list[int] | None,
        tp_size: int, tp_rank: int, quant_mode: int,
    ) -> None:  # fmt: skip
        super().__init__()
        assert attention_mask_type == AttentionMaskType.causal, "the plugin takes no other mask"
        assert num_attention_heads % tp_size == 0, (num_attention_heads, tp_size)
        self.heads, self.kv_heads = num_attention_heads // tp_size, -(-num_kv_heads // tp_size)
        self.head_size, self.qk_layernorm = attention_head_size, qk_layernorm
        self._plugin = {
            "layer_idx": local_layer_idx, "heads": self.heads, "kv_heads": self.kv_heads,
            "head_size": attention_head_size, "rotation": position_embedding_type, "base": rotary_embedding_base,
        }  # fmt: skip
        qkv_rows = tp_size * (self.heads + 2 * self.kv_heads) * attention_head_size
        self.qkv = ColumnLinear(hidden_size, qkv_rows, bias, dtype, tp_group, tp_size, gather_output=False)
        inner = tp_size * self.heads * attention_head_size
        self.dense = RowLinear(inner, hidden_size, dense_bias, dtype, tp_group, tp_size)
        if qk_layernorm:
            self.q_layernorm = RmsNorm(attention_head_size, 1e-5, dtype)
            self.k_layernorm = RmsNorm(attention_head_size, 1e-5, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        use_cache: bool = False,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        all_reduce_params: AllReduceParams | None = None,
    ) -> Any:
        qkv = self.qkv(hidden_states, None)
        if self.qk_layernorm:
            qkv = self._normalised(qkv)
        context = record("attention", (qkv,), qkv.dtype, 2, **self._plugin)
        context = self.dense(context, all_reduce_params=all_reduce_params)
        return (context, None) if use_cache else context

    def _normalised(self, qkv: Tensor) -> Tensor:
        tokens, total = shape(qkv, 0), self.heads + 2 * self.kv_heads
        if self.heads != self.kv_heads:
            by_head = qkv.view(concat([tokens, total, self.head_size]))
            query, key, value = split(by_head, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        else:  # head by head: query, key, value
            by_head = qkv.view(concat([tokens, self.heads, 3, self.head_size]))
            own = concat([tokens, self.heads, self.head_size])
            query, key, value = (part.view(own) for part in split(by_head, [1, 1, 1], dim=2))
        query = self.q_layernorm(query, normalized_shape=None)
        key = self.k_layernorm(key, normalized_shape=None)
        return concat([query, key, value], dim=1).view(concat([tokens, total * self.head_size]))
