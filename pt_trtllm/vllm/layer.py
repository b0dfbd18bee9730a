"""One layer of all local tracks at once: what vLLM computes in common, over what each track owns (track.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention as CachedAttention

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.norms import Stream, normed
from pt_trtllm.vllm.products import BatchedProducts, TrackProducts
from pt_trtllm.vllm.track import Attention, DenseFeedForward, TrackLayer

Parts = list[torch.Tensor]
"""One tensor [tokens, features] per local track."""


class Layer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        mapping: Mapping,
        vllm_config: VllmConfig,
        tracks: Sequence[TrackLayer],
        layer_idx: int,
        *,
        rotary_emb: nn.Module,
        group: GroupCoordinator | None,
        batched: bool,
        prefix: str,
    ) -> None:
        """`rotary_emb` is shared by all layers; `group` are the ranks that share a track, None without any."""
        super().__init__()
        self.config, self.group = config, group
        self.is_quantised = vllm_config.quant_config is not None
        self.tracks = tuple(tracks)  # a tuple: their modules belong to the tracks, under the checkpoint's names
        self.rotary_emb = rotary_emb if config.uses_rope(layer_idx) else None
        heads, kv_heads = config.num_attention_heads // mapping.tp_size, mapping.kv_heads_per_rank(config.num_kv_heads)
        self.qkv_sizes = [count * config.head_dim for count in (heads, kv_heads, kv_heads)]
        window = config.window(layer_idx)
        # Over the heads of all local tracks: they never mix, and the cache is one.
        self.attn = CachedAttention(
            len(tracks) * heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=len(tracks) * kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=None if window is None else window + 1,  # vLLM counts the current token, too
            prefix=f"{prefix}.attn",
        )
        products = BatchedProducts if batched else TrackProducts
        attentions: list[Attention] = [track.self_attn for track in tracks]
        self.qkv, self.out = products(attentions, "qkv_proj"), products(attentions, "o_proj")
        dense = [track.mlp for track in tracks if isinstance(track.mlp, DenseFeedForward)]
        self.is_dense = bool(dense)
        if self.is_dense:
            self.gate_up, self.down = products(dense, "gate_up_proj"), products(dense, "down_proj")
            self.activation = SiluAndMul()

    def forward(self, streams: list[Stream], positions: torch.Tensor, inputs: Parts | None = None) -> list[Stream]:
        """`inputs`: the first norms of the streams, where somebody has made them already."""
        if inputs is None:
            inputs, streams = self._normed([track.input_layernorm for track in self.tracks], streams)
        outputs = self._whole(self._attention(inputs, positions))
        streams = [
            track.after_attention(stream, y) for track, stream, y in zip(self.tracks, streams, outputs, strict=True)
        ]
        inputs, streams = self._normed([track.post_attention_layernorm for track in self.tracks], streams)
        outputs = self._whole(self._feed_forward(inputs))
        return [
            track.after_feed_forward(stream, y) for track, stream, y in zip(self.tracks, streams, outputs, strict=True)
        ]

    def _attention(self, inputs: Parts, positions: torch.Tensor) -> Parts:
        projected = [qkv.split(self.qkv_sizes, dim=-1) for qkv in self.qkv(inputs)]
        queries, keys, values = (list(parts) for parts in zip(*projected, strict=True))
        if self.config.qk_norm_position == "before_rope":
            queries, keys = self._qk_normed(queries, keys)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, _beside(queries), _beside(keys))
            queries, keys = self._apart(query), self._apart(key)
        if self.config.qk_norm_position == "after_rope":
            queries, keys = self._qk_normed(queries, keys)
        attended = self._apart(self.attn(_beside(queries), _beside(keys), _beside(values)))
        if self.is_quantised:  # some kernels that quantise want rows without gaps
            attended = [part.contiguous() for part in attended]
        outputs: Parts = self.out(attended)
        return outputs

    def _feed_forward(self, inputs: Parts) -> Parts:
        if not self.is_dense:
            return [track.mlp(x) for track, x in zip(self.tracks, inputs, strict=True)]
        outputs: Parts = self.down([self.activation(y) for y in self.gate_up(inputs)])
        return outputs

    def _whole(self, parts: Parts) -> Parts:
        """Sums of partial results over the ranks that share a track."""
        return parts if self.group is None else [self.group.all_reduce(part) for part in parts]

    def _normed(self, norms: list[nn.Module | None], streams: list[Stream]) -> tuple[Parts, list[Stream]]:
        pairs = [normed(norm, stream) for norm, stream in zip(norms, streams, strict=True)]
        return [y for y, _ in pairs], [stream for _, stream in pairs]

    def _qk_normed(self, queries: Parts, keys: Parts) -> tuple[Parts, Parts]:
        pairs = [track.self_attn.normalise(q, k) for track, q, k in zip(self.tracks, queries, keys, strict=True)]
        return [q for q, _ in pairs], [k for _, k in pairs]

    def _apart(self, whole: torch.Tensor) -> Parts:
        return [whole] if len(self.tracks) == 1 else list(whole.chunk(len(self.tracks), dim=-1))


def _beside(parts: Parts) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
