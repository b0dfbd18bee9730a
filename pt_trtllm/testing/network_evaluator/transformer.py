"""The layers made for language models: rotary positions, the KV cache, attention, mixture of experts."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional

from pt_trtllm.testing.network_evaluator.kinds import Inputs, integers, layer_kind, present
from pt_trtllm.testing.network_evaluator.values import NotEvaluated

T = torch.Tensor


@layer_kind("ROTARY_EMBEDDING", "IRotaryEmbeddingLayer")
def rotary_embedding(layer: Any, inputs: Inputs) -> list[T]:
    """Rotates pairs of features of [batch, heads, tokens, head]: neighbours (interleaved) or the two halves."""
    x, cos, sin = inputs[:3]
    positions = present(inputs, 3)
    if positions is not None:
        assert int(positions.min()) >= 0, f"{layer.name}: position {int(positions.min())}"
        assert int(positions.max()) < len(cos), f"{layer.name}: position {int(positions.max())} of {len(cos)}"
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # for every head
    rotated, rest = x, x[..., :0]
    if layer.rotary_embedding_dim:
        rotated, rest = x[..., : layer.rotary_embedding_dim], x[..., layer.rotary_embedding_dim :]
    if layer.interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if layer.interleaved else torch.cat(pair, dim=-1)
    return [torch.cat([rotated, rest], dim=-1)]


@layer_kind("KV_CACHE_UPDATE", "IKVCacheUpdateLayer")
def kv_cache_update(layer: Any, inputs: Inputs) -> list[T]:
    """Sequence i's new rows go to cache[i, :, write_indices[i]:]."""
    cache, update, starts = inputs[0].clone(), inputs[1], integers(inputs[2])
    if layer.cache_mode.name != "LINEAR":
        raise NotEvaluated(f"KV cache mode {layer.cache_mode.name}")
    if layer.update_form.name == "PACKED_NHD":
        rows = [part.transpose(0, 1) for part in _unpack(update, inputs[3])]
    else:
        rows = list(update)
    for sequence, (new, start) in enumerate(zip(rows, starts, strict=True)):
        end = start + new.shape[1]
        # TensorRT ignores such updates silently, which no network of ours means.
        assert start >= 0, f"{layer.name}: writes from row {start}"
        assert end <= cache.shape[2], f"{layer.name}: rows {start} to {end} of a cache of {cache.shape[2]}"
        cache[sequence, :, start:end] = new
    return [cache]


def _unpack(packed: T, lengths: T) -> list[T]:
    """[tokens, heads, head] by cumulative lengths."""
    bounds = integers(lengths)
    assert bounds[0] == 0, f"cumulative lengths start with {bounds[0]}"
    return [packed[first:last] for first, last in itertools.pairwise(bounds)]


@layer_kind("ATTENTION_INPUT", "IAttentionInputLayer")
def attention(layer: Any, inputs: Inputs) -> list[T]:
    """Everything between the boundary layers of an `IAttention`. Scores are not scaled: the network scales the query.

    With lengths of keys and values, a sequence's s_kv is its own length, so that the lower right corner of the causal
    mask is the newest key; keys beyond it are not seen.
    """
    options = layer.attention
    if options.normalization_quantize_scale is not None or getattr(options, "num_ranks", 1) != 1:
        raise NotEvaluated(f"{layer.name}: quantised attention weights, or attention over several ranks")
    query, key, value = inputs[:3]
    mask, query_lengths, kv_lengths = (present(inputs, index) for index in (3, 5, 6))
    packed_query = options.query_form.name == "PACKED_NHD"
    if packed_query:
        assert query_lengths is not None
        queries = [part.transpose(0, 1) for part in _unpack(query, query_lengths)]
    else:
        queries = list(query)
    if options.key_value_form.name == "PACKED_NHD":
        assert kv_lengths is not None
        keys, values = ([part.transpose(0, 1) for part in _unpack(t, kv_lengths)] for t in (key, value))
    else:
        lengths = [key.shape[2]] * len(key) if kv_lengths is None else integers(kv_lengths)
        assert all(0 <= length <= key.shape[2] for length in lengths), f"{layer.name}: lengths {lengths} of {key.shape}"
        keys, values = ([t[i, :, :length] for i, length in enumerate(lengths)] for t in (key, value))
    if mask is not None and packed_query:
        raise NotEvaluated(f"{layer.name}: a mask over packed queries")
    outputs = []
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        allowed = None if mask is None else mask[i if mask.shape[0] > 1 else 0][..., : k.shape[1]]
        outputs.append(_attend(options, q, k, v, allowed))
    if not packed_query:
        return [torch.stack(outputs)]
    result = torch.zeros_like(query)
    result[: sum(part.shape[1] for part in outputs)] = torch.cat([part.transpose(0, 1) for part in outputs])
    return [result]


def _attend(options: Any, query: T, key: T, value: T, mask: T | None) -> T:
    """One sequence: [heads, tokens, head] each; fewer heads of keys are shared by groups of query heads."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    scores = query @ key.transpose(1, 2)
    causal = options.causal_kind.name
    if causal != "NONE":
        if mask is not None:
            raise NotEvaluated("attention with both a mask and a causal kind")
        shift = key.shape[1] - query.shape[1] if causal == "LOWER_RIGHT" else 0
        mask = torch.arange(key.shape[1])[None] <= torch.arange(query.shape[1])[:, None] + shift
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if options.norm_op.name == "NONE":
        if causal != "NONE" or (mask is not None and mask.dtype == torch.bool):
            raise NotEvaluated("masked attention without softmax")
        return scores @ value
    # A query that sees nothing (padding) has no defined result: zeros here, which must not reach any output.
    return scores.softmax(dim=-1).nan_to_num(0.0) @ value


@layer_kind("ATTENTION_OUTPUT", "IAttentionOutputLayer")
def attention_output(layer: Any, inputs: Inputs) -> list[T]:
    return [inputs[0]]


@layer_kind("MOE", "IMoELayer")
def moe(layer: Any, inputs: Inputs) -> list[T]:
    """The sum of score * down(up(x) * silu(gate(x))) over the experts selected for each token."""
    x, selected, scores, gate, up, down = inputs[:6]
    if any(extra is not None for extra in inputs[6:]) or layer.activation_type.name != "SILU":
        raise NotEvaluated(f"{layer.name}: experts with biases, quantisation or {layer.activation_type.name}")
    if (layer.swiglu_param_limit, layer.swiglu_param_alpha, layer.swiglu_param_beta) != (float("inf"), 1.0, 0.0):
        raise NotEvaluated(f"{layer.name}: parameters of SwiGLU")
    result = torch.zeros_like(x)
    for batch, token, choice in torch.cartesian_prod(*(torch.arange(size) for size in selected.shape)).tolist():
        expert, row = int(selected[batch, token, choice]), x[batch, token]
        hidden = functional.silu(row @ gate[expert]) * (row @ up[expert])
        result[batch, token] += scores[batch, token, choice] * (hidden @ down[expert])
    return [result]
