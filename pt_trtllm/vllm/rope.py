"""Rotary positions in vLLM: its kernels, over the tables that every engine of this project uses."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from pt_trtllm.config import ModelConfig
from pt_trtllm.network.rope import rope_tables


class TrackRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotates all tracks' queries and keys, [tokens, heads * head_dim], in one call.

    vLLM's own tables differ in the last bits of a frequency, which at position 100000 is a hundredth of a radian;
    and its scalings read other options than ours.
    """

    def __init__(self, config: ModelConfig, num_positions: int, dtype: torch.dtype) -> None:
        self._described, self._num_positions = config, num_positions  # the base class asks for the tables at once
        super().__init__(
            config.head_dim, config.head_dim, num_positions, config.rope_theta, config.rope_style == "half", dtype
        )

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        with torch.device("cpu"):
            tables = torch.cat(rope_tables(self._described, self._num_positions), dim=-1)
        return tables.to(torch.get_default_device())
