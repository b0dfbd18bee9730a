"""Keys and values of past tokens: one contiguous region per layer and slot."""

from __future__ import annotations

import torch

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping


class KvCache:
    """[tracks, slots, kv_heads, max_seq_len, head_dim] per layer. Pages that no sequence reaches cost no memory."""

    def __init__(
        self, config: ModelConfig, mapping: Mapping, *, num_slots: int, max_seq_len: int, dtype: torch.dtype
    ) -> None:
        kv_heads = mapping.kv_heads_per_rank(config.num_kv_heads)
        shape = (mapping.tracks_per_rank, num_slots, kv_heads, max_seq_len, config.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self._values = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]

    def append(
        self, layer_idx: int, slot: int, past: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [tracks, new, kv_heads, dim] after `past` tokens; returns all [tracks, kv_heads, past + new, dim]."""
        end = past + key.shape[1]
        keys, values = self._keys[layer_idx][:, slot], self._values[layer_idx][:, slot]
        keys[:, :, past:end] = key.transpose(1, 2)
        values[:, :, past:end] = value.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]
