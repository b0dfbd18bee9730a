"""`PTForCausalLM` for vLLM: tracks of vLLM's layers that meet once per segment.

The order of operations is that of `pt_trtllm/network/decoder.py`, which vLLM's layers cannot be lowered from: they own
their weights, and add and normalise in one. Tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention as CachedAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.sequence import IntermediateTensors

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.fusion import TrackFusion, track_group
from pt_trtllm.vllm.layers import Stream, TrackLayer, make_norm, normed
from pt_trtllm.vllm.loading import load_weights
from pt_trtllm.vllm.quantised import tied_head_problem
from pt_trtllm.vllm.refusals import mapping_of
from pt_trtllm.vllm.rope import TrackRotaryEmbedding
from pt_trtllm.vllm.weights import PACKED


class Segment(nn.Module):
    """One track's norms where a segment begins and ends."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dispatch_norm = make_norm(config.dispatch_norm, config.hidden_size, config.rms_norm_eps)
        self.combine_norm = make_norm(config.combine_norm, config.hidden_size, config.rms_norm_eps)


class Track(nn.Module):
    def __init__(self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str, track_idx: int):
        super().__init__()
        self.layers = nn.ModuleList(
            TrackLayer(config, mapping, quant_config, f"{prefix}.layers.{layer_idx}", track_idx, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.segments = nn.ModuleList(Segment(config) for _ in range(config.num_hidden_layers // config.interval))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class PTModel(nn.Module):
    """Token ids to hidden states. Modules bear the checkpoint's names, tracks their numbers in the whole model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: ModelConfig = vllm_config.model_config.hf_config.model
        self.mapping = mapping_of(self.config, vllm_config, get_tensor_model_parallel_rank())
        config, mapping, quant_config = self.config, self.mapping, vllm_config.quant_config
        # Replicated: a sharded embedding would be one more all-reduce in every pass.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens", disable_tp=True
        )
        self.tracks = nn.ModuleDict(
            {
                str(track_idx): Track(config, mapping, quant_config, f"{prefix}.tracks.{track_idx}", track_idx)
                for track_idx in mapping.local_tracks
            }
        )
        # One attention per layer over the heads of all local tracks: heads never mix, and the cache is one.
        self.attention = nn.ModuleList(
            CachedAttention(
                len(mapping.local_tracks) * (config.num_attention_heads // mapping.tp_size),
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=len(mapping.local_tracks) * mapping.kv_heads_per_rank(config.num_kv_heads),
                cache_config=vllm_config.cache_config,
                quant_config=quant_config,
                per_layer_sliding_window=_window(config, layer_idx),
                prefix=f"{prefix}.layers.{layer_idx}.attn",
            )
            for layer_idx in range(config.num_hidden_layers)
        )
        model_config = vllm_config.model_config
        self.rotary_emb = TrackRotaryEmbedding(
            config, max(config.max_position_embeddings, model_config.max_model_len), model_config.dtype
        )
        self.fusion = TrackFusion(mapping, config.combine_op)
        self.group = track_group(mapping)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for first in range(0, self.config.num_hidden_layers, self.config.interval):
            hidden = self._segment(hidden, positions, first)
        normalised: torch.Tensor = self.norm(hidden)
        return normalised

    def _segment(self, hidden: torch.Tensor, positions: torch.Tensor, first: int) -> torch.Tensor:
        tracks = list(self.tracks.values())
        norms = [track.segments[first // self.config.interval] for track in tracks]
        streams: list[Stream] = [(x, None) for x in _dispatch(hidden, [norm.dispatch_norm for norm in norms])]
        for layer_idx in range(first, first + self.config.interval):
            layers = [track.layers[layer_idx] for track in tracks]
            streams = self._attend(streams, positions, layers, layer_idx)
            streams = self._feed_forward(streams, layers)
        ends = [normed(norm.combine_norm, stream)[0] for norm, stream in zip(norms, streams, strict=True)]
        return self.fusion(ends)

    def _attend(
        self, streams: list[Stream], positions: torch.Tensor, layers: list[TrackLayer], layer_idx: int
    ) -> list[Stream]:
        inputs, streams = _normed([layer.input_layernorm for layer in layers], streams)
        projected = [layer.self_attn.project(x) for layer, x in zip(layers, inputs, strict=True)]
        queries, keys, values = (list(each) for each in zip(*projected, strict=True))
        if self.config.qk_norm_position == "before_rope":
            queries, keys = _normalise(layers, queries, keys)
        if self.config.uses_rope(layer_idx):
            query, key = self.rotary_emb(positions, _beside(queries), _beside(keys))
            queries, keys = _apart(query, len(layers)), _apart(key, len(layers))
        if self.config.qk_norm_position == "after_rope":
            queries, keys = _normalise(layers, queries, keys)
        seen = self.attention[layer_idx](_beside(queries), _beside(keys), _beside(values))
        outputs = [layer.self_attn.o_proj(y)[0] for layer, y in zip(layers, _apart(seen, len(layers)), strict=True)]
        return [
            layer.after_attention(stream, self._whole(y))
            for layer, stream, y in zip(layers, streams, outputs, strict=True)
        ]

    def _feed_forward(self, streams: list[Stream], layers: list[TrackLayer]) -> list[Stream]:
        inputs, streams = _normed([layer.post_attention_layernorm for layer in layers], streams)
        outputs = [layer.mlp(x) for layer, x in zip(layers, inputs, strict=True)]
        return [
            layer.after_feed_forward(stream, self._whole(y))
            for layer, stream, y in zip(layers, streams, outputs, strict=True)
        ]

    def _whole(self, y: torch.Tensor) -> torch.Tensor:
        """The sum of partial results over the ranks that share a track."""
        if self.group is None:
            return y
        summed: torch.Tensor = self.group.all_reduce(y)
        return summed


class PTForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):  # type: ignore[misc]
    packed_modules_mapping = PACKED
    embedding_modules: ClassVar[dict[str, str]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = PTModel(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.config, self.mapping = self.model.config, self.model.mapping
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.lm_head" if prefix else "lm_head",
        )  # fmt: skip
        if self.config.tie_word_embeddings:
            problem = tied_head_problem(name for name, _ in self.lm_head.named_parameters())
            if problem is not None:
                raise ConfigError(f"a PT model does not support {problem}")
        if self.config.tie_word_embeddings and self.mapping.world_size == 1:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, self.config, self.mapping, weights)


def _window(config: ModelConfig, layer_idx: int) -> int | None:
    window = config.window(layer_idx)
    return None if window is None else window + 1  # vLLM counts the current token, too


def _dispatch(hidden: torch.Tensor, norms: list[nn.Module | None]) -> list[torch.Tensor]:
    """Each track gets the hidden states as its own: vLLM's norms add in place."""
    last = len(norms) - 1
    return [
        norm(hidden) if norm is not None else hidden if index == last else hidden.clone()
        for index, norm in enumerate(norms)
    ]


def _normed(norms: list[nn.Module | None], streams: list[Stream]) -> tuple[list[torch.Tensor], list[Stream]]:
    pairs = [normed(norm, stream) for norm, stream in zip(norms, streams, strict=True)]
    return [y for y, _ in pairs], [stream for _, stream in pairs]


def _normalise(
    layers: list[TrackLayer], queries: list[torch.Tensor], keys: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = [layer.self_attn.normalise(q, k) for layer, q, k in zip(layers, queries, keys, strict=True)]
    return [q for q, _ in pairs], [k for _, k in pairs]


def _beside(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _apart(whole: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [whole] if count == 1 else list(whole.chunk(count, dim=-1))
