"""The Parallel Track decoder, written once. Every engine lowers this function."""

from __future__ import annotations

from pt_trtllm.checkpoint.spec import EMBEDDING, LAYER, OUTPUT_NORM, OUTPUT_PROJECTION
from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping
from pt_trtllm.network.graph import AttentionSpec, Graph, MoeSpec, T


def pt_decoder(graph: Graph[T], config: ModelConfig, mapping: Mapping) -> T:
    """Token ids to logits. Tracks meet at the end of every segment of `config.interval` layers."""
    hidden = graph.embedding(EMBEDDING)
    for first in range(0, config.num_hidden_layers, config.interval):
        x = graph.dispatch(hidden)
        x = _norm(graph, config, x, config.dispatch_norm, _name(first, "dispatch_layernorm"))
        for layer_idx in range(first, first + config.interval):
            x = _attention_block(graph, config, mapping, x, layer_idx)
            x = _feed_forward_block(graph, config, mapping, x, layer_idx)
        last = first + config.interval - 1
        x = _norm(graph, config, x, config.combine_norm, _name(last, "combine_layernorm"))
        hidden = graph.track_fusion(x, hidden, config.combine_op)
    hidden = graph.rms_norm(hidden, OUTPUT_NORM, eps=config.rms_norm_eps)
    return graph.logits(hidden, EMBEDDING if config.tie_word_embeddings else OUTPUT_PROJECTION)


def _attention_block(graph: Graph[T], config: ModelConfig, mapping: Mapping, x: T, layer_idx: int) -> T:
    spec = AttentionSpec(
        layer_idx=layer_idx,
        num_heads=config.num_attention_heads // mapping.tp_size,
        num_kv_heads=mapping.kv_heads_per_rank(config.num_kv_heads),
        head_dim=config.head_dim,
        window=config.window(layer_idx),
    )
    y = _norm(graph, config, x, config.pre_norm, _name(layer_idx, "input_layernorm"))
    qkv = _column_parallel(graph, y, _name(layer_idx, "attention.qkv"), config.attention_bias)
    query, key, value = graph.split_heads(qkv, spec)
    if config.qk_norm_position == "before_rope":
        query, key = _qk_norm(graph, config, query, key, layer_idx)
    if config.uses_rope(layer_idx):
        query, key = graph.rope(query), graph.rope(key)
    if config.qk_norm_position == "after_rope":
        query, key = _qk_norm(graph, config, query, key, layer_idx)
    y = graph.attention(query, key, value, spec)
    y = _row_parallel(graph, mapping, y, _name(layer_idx, "attention.dense"), config.attention_out_bias)
    return _residual(graph, config, x, y, layer_idx, "attention")


def _feed_forward_block(graph: Graph[T], config: ModelConfig, mapping: Mapping, x: T, layer_idx: int) -> T:
    y = _norm(graph, config, x, config.pre_norm, _name(layer_idx, "post_layernorm"))
    if config.feed_forward_kind(layer_idx) == "dense":
        gate = _column_parallel(graph, y, _name(layer_idx, "mlp.fc"), config.mlp_bias)
        up = _column_parallel(graph, y, _name(layer_idx, "mlp.gate"), config.mlp_bias)
        y = _row_parallel(graph, mapping, graph.swiglu(gate, up), _name(layer_idx, "mlp.proj"), config.mlp_bias)
    else:
        spec = MoeSpec(
            router=_name(layer_idx, "mlp.router") + ".weight",
            up_gate=_name(layer_idx, "mlp.fc") + ".weight",
            down=_name(layer_idx, "mlp.proj") + ".weight",
            experts_per_token=config.num_experts_per_tok,
            logits_cap=config.router_logits_cap,
        )
        y = graph.moe(y, spec)
        if mapping.tp_size > 1:
            y = graph.all_reduce(y)
    return _residual(graph, config, x, y, layer_idx, "mlp")


def _residual(graph: Graph[T], config: ModelConfig, x: T, y: T, layer_idx: int, block: str) -> T:
    y = _norm(graph, config, y, config.pre_residual_norm, _name(layer_idx, f"{block}_pre_residual_layernorm"))
    return _norm(graph, config, graph.add(x, y), config.post_norm, _name(layer_idx, f"{block}_post_residual_layernorm"))


def _qk_norm(graph: Graph[T], config: ModelConfig, query: T, key: T, layer_idx: int) -> tuple[T, T]:
    if config.qk_norm == "none":
        return query, key
    scaled = config.qk_norm == "scaled"
    names = [_name(layer_idx, f"attention.{letter}_layernorm") + ".weight" if scaled else None for letter in "qk"]
    return (
        graph.rms_norm(query, names[0], eps=config.rms_norm_eps),
        graph.rms_norm(key, names[1], eps=config.rms_norm_eps),
    )


def _norm(graph: Graph[T], config: ModelConfig, x: T, kind: str | None, name: str) -> T:
    if kind is None:
        return x
    return graph.rms_norm(x, f"{name}.weight", eps=config.rms_norm_eps, pre_scale=kind == "pre_scale_rms_norm")


def _column_parallel(graph: Graph[T], x: T, name: str, bias: bool) -> T:
    y = graph.linear(x, f"{name}.weight")
    return graph.add_bias(y, f"{name}.bias") if bias else y


def _row_parallel(graph: Graph[T], mapping: Mapping, x: T, name: str, bias: bool) -> T:
    y = graph.linear(x, f"{name}.weight")
    if mapping.tp_size > 1:
        y = graph.all_reduce(y)
    return graph.add_bias(y, f"{name}.bias") if bias else y  # once, after the partial sums met


def _name(layer_idx: int, name: str) -> str:
    return LAYER.format(layer=layer_idx) + name
