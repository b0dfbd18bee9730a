"""Attention over a linear KV cache in TensorRT's native layers, in their padded form [batch, heads, tokens, head_dim].

Heads of all local tracks lie side by side: tracks are a batch for attention, too. A global layer is causal by its
lengths: row i of n new tokens sees the first `key_value_lengths - n + i + 1` keys. A window needs a mask.
"""

from __future__ import annotations

import math

import torch

from pt_trtllm.engine.tensorrt.layers import Layers, Tensor
from pt_trtllm.network.graph import AttentionSpec


class CachedAttention:
    def __init__(self, layers: Layers, inputs: dict[str, Tensor], num_tracks: int) -> None:
        self._layers, self._inputs, self._num_tracks = layers, inputs, num_tracks
        self._masks: dict[int, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        """The updated caches, by name."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """[batch, tracks, heads, tokens, head_dim] each to [tracks, batch * tokens, heads * head_dim]"""
        layers, trt = self._layers, self._layers.trt
        keys = self._updated("key", self._all_heads(key, spec.num_kv_heads, spec.head_dim), spec.layer_idx)
        values = self._updated("value", self._all_heads(value, spec.num_kv_heads, spec.head_dim), spec.layer_idx)
        query = self._all_heads(query, spec.num_heads, spec.head_dim)
        query = layers.scaled(query, 1 / math.sqrt(spec.head_dim))  # the layer itself does not scale
        causal = trt.CausalMaskKind.LOWER_RIGHT if spec.window is None else trt.CausalMaskKind.NONE
        attention = layers.network.add_attention_v2(query, keys, values, trt.AttentionNormalizationOp.SOFTMAX, causal)
        attention.name = f"attention_{spec.layer_idx}"
        attention.decomposable = True  # where no fused kernel exists, several do the same
        attention.key_value_lengths = self._inputs["key_value_lengths"]
        if spec.window is not None:
            attention.mask = self._window(spec.window)
        output = layers.reshape(attention.get_output(0), (0, self._num_tracks, spec.num_heads, -1, spec.head_dim))
        output = layers.transpose(output, (1, 0, 3, 2, 4))
        return layers.reshape(output, (self._num_tracks, -1, spec.num_heads * spec.head_dim))

    def _all_heads(self, x: Tensor, num_heads: int, head_dim: int) -> Tensor:
        return self._layers.reshape(x, (0, self._num_tracks * num_heads, -1, head_dim))

    def _updated(self, kind: str, new: Tensor, layer_idx: int) -> Tensor:
        """The cache with the new tokens in place."""
        layers = self._layers
        update = layers.network.add_kv_cache_update(
            self._inputs[f"past_{kind}_{layer_idx}"],
            new,
            self._inputs["cache_write_indices"],
            layers.trt.KVCacheMode.LINEAR,
        )
        output = layers.output(update, f"{kind}_cache_{layer_idx}")
        self.outputs[f"present_{kind}_{layer_idx}"] = output
        return output

    def _window(self, window: int) -> Tensor:
        """[batch, 1, tokens, capacity] bool: keys up to the token itself, and `window` before it."""
        if window not in self._masks:
            layers = self._layers
            capacity = self._inputs["past_key_0"].shape[2]
            keys = layers.constant("key positions", torch.arange(capacity, dtype=torch.int32), (1, 1, 1, capacity))
            whole = layers.shape(self._inputs["position_ids"])
            one = layers.int64(1)
            shape = layers.concat(
                [layers.gather(whole, layers.int64(0)), one, layers.gather(whole, layers.int64(1)), one]
            )
            at = layers.reshape_to(self._inputs["position_ids"], shape)
            ahead = layers.elementwise("SUB", keys, at)
            self._masks[window] = layers.elementwise(
                "AND",
                layers.elementwise("LESS", ahead, layers.scalar(1, ahead)),
                layers.elementwise("GREATER", ahead, layers.scalar(-window - 1, ahead)),
            )
        return self._masks[window]
