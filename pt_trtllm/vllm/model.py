"""`PTForCausalLM` for vLLM: tracks of vLLM's layers that meet once per segment.

The order of operations is that of `pt_trtllm/network/decoder.py`, which vLLM's layers cannot be lowered from: they own
their weights, and add and normalise in one. Tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.sequence import IntermediateTensors

from pt_trtllm.config import ModelConfig
from pt_trtllm.vllm.fusion import TrackFusion, track_group
from pt_trtllm.vllm.layer import Layer
from pt_trtllm.vllm.loading import load_weights
from pt_trtllm.vllm.norms import Stream, normed
from pt_trtllm.vllm.options import PluginOptions
from pt_trtllm.vllm.refusals import mapping_of
from pt_trtllm.vllm.rope import TrackRotaryEmbedding
from pt_trtllm.vllm.track import Track
from pt_trtllm.vllm.weights import PACKED


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class PTModel(nn.Module):
    """Token ids to hidden states. Tracks bear their numbers in the whole model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: ModelConfig = vllm_config.model_config.hf_config.model
        self.mapping = mapping_of(self.config, vllm_config, get_tensor_model_parallel_rank())
        config, mapping, model_config = self.config, self.mapping, vllm_config.model_config
        options = PluginOptions.read(vllm_config.additional_config)
        # Replicated: a sharded embedding would be one more all-reduce in every pass.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens", disable_tp=True
        )
        tracks = {
            str(track_idx): Track(config, mapping, vllm_config.quant_config, f"{prefix}.tracks.{track_idx}", track_idx)
            for track_idx in mapping.local_tracks
        }
        self.local_tracks = tuple(tracks.values())
        rotary_emb = TrackRotaryEmbedding(
            config, max(config.max_position_embeddings, model_config.max_model_len), model_config.dtype
        )
        batched = (
            options.batch_tracks
            and len(tracks) > 1
            and vllm_config.quant_config is None
            and vllm_config.lora_config is None
        )
        group = track_group(mapping)
        # Before the tracks: weights are stacked before vLLM would repack them one by one.
        self.layers = nn.ModuleList(
            Layer(
                config, mapping, vllm_config, [track.layers[layer_idx] for track in self.local_tracks], layer_idx,
                rotary_emb=rotary_emb, group=group, batched=batched, prefix=f"{prefix}.layers.{layer_idx}",
            )
            for layer_idx in range(config.num_hidden_layers)
        )  # fmt: skip
        self.tracks = nn.ModuleDict(tracks)
        self.fusion = TrackFusion(mapping, config.combine_op)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
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
        segments = [track.segments[first // self.config.interval] for track in self.local_tracks]
        streams: list[Stream] = [(x, None) for x in _dispatch(hidden, [each.dispatch_norm for each in segments])]
        for layer_idx in range(first, first + self.config.interval):
            streams = self.layers[layer_idx](streams, positions)
        ends = [normed(each.combine_norm, stream)[0] for each, stream in zip(segments, streams, strict=True)]
        fused: torch.Tensor = self.fusion(ends)
        return fused


class PTForCausalLM(nn.Module, SupportsQuant):  # type: ignore[misc]
    packed_modules_mapping = PACKED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = PTModel(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.config, self.mapping = self.model.config, self.model.mapping
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.lm_head" if prefix else "lm_head",
        )  # fmt: skip
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


def _dispatch(hidden: torch.Tensor, norms: list[nn.Module | None]) -> list[torch.Tensor]:
    """Each track gets the hidden states as its own: vLLM's norms add in place."""
    last = len(norms) - 1
    return [
        norm(hidden) if norm is not None else hidden if index == last else hidden.clone()
        for index, norm in enumerate(norms)
    ]
