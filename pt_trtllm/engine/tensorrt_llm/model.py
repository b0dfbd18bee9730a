"""`PTForCausalLM`: the PT decoder in TensorRT-LLM's own layers, one track per rank.

The ranks are TensorRT-LLM's tensor-parallel ranks, so its workspace, KV cache and checks work as ever; but inside a
block no layer is told of other ranks. Tracks meet in one all-reduce at the end of a segment. Where a track is split
over several ranks, its layers get just that track's ranks as their group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorrt_llm._common import default_net
from tensorrt_llm._utils import pad_vocab_size
from tensorrt_llm.functional import (
    AllReduceParams,
    AllReduceStrategy,
    AttentionMaskType,
    PositionEmbeddingType,
    allreduce,
    constant,
    embedding,
)
from tensorrt_llm.layers import MOE, Attention, ColumnLinear, Embedding, GatedMLP, MoeConfig, RmsNorm
from tensorrt_llm.mapping import Mapping as TrtllmMapping
from tensorrt_llm.models.modeling_utils import DecoderLayerList, DecoderModelForCausalLM
from tensorrt_llm.module import Module

from pt_trtllm.engine.tensorrt_llm.blocks import CappedRouter, QueryKeyTransform, make_norm
from pt_trtllm.engine.tensorrt_llm.config import PTConfig
from pt_trtllm.engine.tensorrt_llm.support import changes_queries_and_keys, rotates_itself
from pt_trtllm.network.rope import rope_tables

Tensor = Any
CUSTOM_KERNEL_RANKS = (2, 4, 6, 8, 16)
"""Numbers of ranks that its one-shot kernels exist for; AUTO picks them without looking."""


def reduction(group: Sequence[int], world_size: int) -> AllReduceParams:
    """A fresh object each time: the callee changes it. Its custom kernels know only the whole world's workspace."""
    whole = len(group) == world_size and world_size in CUSTOM_KERNEL_RANKS
    return AllReduceParams(strategy=AllReduceStrategy.AUTO if whole else AllReduceStrategy.NCCL)


class PTDecoderLayer(Module):  # type: ignore[misc]
    def __init__(self, config: PTConfig, layer_idx: int) -> None:
        super().__init__()
        model, self.place = config.checkpoint.model, config.place
        self.model, self.layer_idx, self.dtype = model, layer_idx, config.dtype
        self.split = self.place.tp_size > 1
        self.group = list(self.place.tp_group) if self.split else None
        first, last = layer_idx % model.interval == 0, (layer_idx + 1) % model.interval == 0
        self.dispatch_layernorm = make_norm(model, model.dispatch_norm if first else None, config.dtype)
        self.input_layernorm = make_norm(model, model.pre_norm, config.dtype)
        self.attention = self._attention(config)
        self.attention_pre_residual_layernorm = make_norm(model, model.pre_residual_norm, config.dtype)
        self.attention_post_residual_layernorm = make_norm(model, model.post_norm, config.dtype)
        self.post_layernorm = make_norm(model, model.pre_norm, config.dtype)
        self.mlp = self._dense(config) if model.feed_forward_kind(layer_idx) == "dense" else self._sparse(config)
        self.mlp_pre_residual_layernorm = make_norm(model, model.pre_residual_norm, config.dtype)
        self.mlp_post_residual_layernorm = make_norm(model, model.post_norm, config.dtype)
        self.combine_layernorm = make_norm(model, model.combine_norm if last else None, config.dtype)
        self.ends_segment = last

    def _attention(self, config: PTConfig) -> Attention:
        model, layer_idx = self.model, self.layer_idx
        rotation = PositionEmbeddingType.learned_absolute  # the plugin rotates nothing
        if model.uses_rope(layer_idx) and not rotates_itself(model, layer_idx):
            interleaved = model.rope_style == "interleaved"
            rotation = PositionEmbeddingType.rope_gptj if interleaved else PositionEmbeddingType.rope_gpt_neox
        changed = changes_queries_and_keys(model, layer_idx)
        attention = Attention(
            local_layer_idx=layer_idx,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_kv_heads=model.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            num_layers=model.num_hidden_layers,
            attention_head_size=model.head_dim,
            qk_layernorm=changed,
            attention_mask_type=AttentionMaskType.causal,
            bias=model.attention_bias,
            dense_bias=model.attention_out_bias,
            dtype=config.dtype,
            position_embedding_type=rotation,
            rotary_embedding_base=model.rope_theta,
            tp_group=self.group,
            tp_size=self.place.tp_size,
            tp_rank=self.place.tp_rank,
            quant_mode=config.quant_mode,
        )
        if changed:
            attention.q_layernorm = QueryKeyTransform(model, layer_idx, config.dtype)
            attention.k_layernorm = QueryKeyTransform(model, layer_idx, config.dtype)
        return attention

    def _dense(self, config: PTConfig) -> GatedMLP:
        return GatedMLP(
            hidden_size=self.model.hidden_size,
            ffn_hidden_size=self.model.intermediate_size,
            hidden_act="silu",
            bias=self.model.mlp_bias,
            dtype=config.dtype,
            tp_group=self.group,
            tp_size=self.place.tp_size,
            quant_mode=config.quant_mode,
        )

    def _sparse(self, config: PTConfig) -> MOE:
        """A mapping of its own: the world's would divide the experts among tracks."""
        model, place = self.model, self.place
        mixture = MOE(
            moe_config=MoeConfig(
                num_experts=model.num_experts,
                top_k=model.num_experts_per_tok,
                normalization_mode=MoeConfig.ExpertScaleNormalizationMode.RENORMALIZE,
            ),
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.moe_intermediate_size,
            hidden_act="swiglu",
            mapping=TrtllmMapping(world_size=place.tp_size, tp_size=place.tp_size, rank=place.tp_rank),
            bias=False,
            dtype=config.dtype,
            tp_group=self.group,
            tp_size=place.tp_size,
            quant_mode=config.quant_mode,
            use_all_reduce=self.split,
        )
        if model.router_logits_cap is not None:
            mixture.router = CappedRouter(
                model.hidden_size, model.num_experts, bias=False, dtype="float32", tp_group=None, tp_size=1,
                strict_dtype=True,
            )  # fmt: skip
            mixture.router.cap = model.router_logits_cap
        return mixture

    def forward(
        self,
        hidden_states: Tensor,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        position_ids: Any = None,
    ) -> Any:
        """`position_ids` is what the model handed to the list of layers: the angles of the tokens."""
        if changes_queries_and_keys(self.model, self.layer_idx):
            self.attention.q_layernorm.angles = self.attention.k_layernorm.angles = position_ids
        x = _apply(self.dispatch_layernorm, hidden_states)
        y = self.attention(
            _apply(self.input_layernorm, x),
            attention_mask=attention_mask,
            use_cache=use_cache,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            all_reduce_params=self._inside(),
        )
        y, present = y if use_cache else (y, None)
        x = _apply(self.attention_post_residual_layernorm, x + _apply(self.attention_pre_residual_layernorm, y))
        y = self.mlp(_apply(self.post_layernorm, x), all_reduce_params=self._inside())
        x = _apply(self.mlp_post_residual_layernorm, x + _apply(self.mlp_pre_residual_layernorm, y))
        if self.ends_segment:
            x = self._fuse(_apply(self.combine_layernorm, x))
        return (x, present) if use_cache else x

    def _inside(self) -> AllReduceParams | None:
        """For the two sums of a layer whose track is split; None where there are none."""
        return reduction(self.place.tp_group, self.place.world_size) if self.split else None

    def _fuse(self, x: Tensor) -> Tensor:
        group = list(self.place.fusion_group)
        if len(group) == 1:
            return x
        if self.model.combine_op == "mean":
            x = x * (1.0 / self.model.num_tracks)  # before the sum, which then stays within float16
        return allreduce(x, group, all_reduce_params=reduction(group, self.place.world_size))


def _apply(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class PTModel(Module):  # type: ignore[misc]
    def __init__(self, config: PTConfig) -> None:
        super().__init__()
        model = self.model = config.checkpoint.model
        self.rope_positions = config.rope_positions
        self.vocab_embedding = Embedding(model.vocab_size, model.hidden_size, dtype=config.dtype)
        self.layers = DecoderLayerList(PTDecoderLayer, config)
        self.ln_f = RmsNorm(normalized_shape=model.hidden_size, eps=model.rms_norm_eps, dtype=config.dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
    ) -> Any:
        if default_net().plugin_config.gemm_allreduce_plugin:
            raise ValueError("PTForCausalLM: gemm_allreduce_plugin would sum inside blocks; build with it disabled")
        hidden = self.layers.forward(
            self.vocab_embedding(input_ids),
            use_cache=use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            position_ids=self._angles(position_ids),
        )
        if use_cache:
            hidden, presents = hidden
            return self.ln_f(hidden), presents
        return self.ln_f(hidden)

    def _angles(self, position_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Looked up once for all layers; None where no layer rotates by itself."""
        if not any(rotates_itself(self.model, i) for i in range(self.model.num_hidden_layers)):
            return None
        cos, sin = rope_tables(self.model, self.rope_positions)
        return embedding(position_ids, constant(cos.numpy())), embedding(position_ids, constant(sin.numpy()))


class PTForCausalLM(DecoderModelForCausalLM):  # type: ignore[misc]
    config_class = PTConfig

    def __init__(self, config: PTConfig) -> None:
        mapping = config.mapping
        head = ColumnLinear(
            config.hidden_size,
            pad_vocab_size(config.vocab_size, mapping.tp_size),
            bias=False,
            dtype=config.dtype,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            gather_output=True,
        )
        super().__init__(config, PTModel(config), head)

    def check_config(self, config: PTConfig) -> None:
        """`PTConfig` checked itself when it was made."""
