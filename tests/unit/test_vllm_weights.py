"""Where a checkpoint's tensors go in vLLM: over all ranks each element arrives, and where it is in our engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.sources.base import part_shape
from pt_trtllm.checkpoint.sources.pt import spelling
from pt_trtllm.checkpoint.spec import RowSplit, rank_rows, row_runs
from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.loading import cut
from pt_trtllm.vllm.weights import EMBEDDING, HEAD, OUTPUT_NORM, placements, track_of

pytestmark = pytest.mark.unit

EVERYTHING: dict[str, Any] = {
    "vocab_size": 7, "num_hidden_layers": 2, "sync_interval": 1, "hidden_size": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 2, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 3,
    "num_experts_per_tok": 2, "feed_forward_pattern": ("dense", "sparse"), "attention_bias": True,
    "attention_out_bias": True, "mlp_bias": True, "qk_norm": "scaled", "post_norm": "rms_norm",
    "pre_residual_norm": "rms_norm", "dispatch_norm": "rms_norm", "combine_norm": "rms_norm",
}  # fmt: skip
WORLDS = [(tracks, ranks) for tracks in (1, 2, 4) for ranks in (1, 2, 4, 8)]


def model_of(num_tracks: int) -> ModelConfig:
    # A sparse feed-forward has no biases: the dense one keeps them.
    return ModelConfig(**{**EVERYTHING, "num_tracks": num_tracks})


def checkpoint_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        part.source_name: torch.randn(part_shape(spec, part), generator=generator)
        for spec, _, parts in spelling(config)
        for part in parts
    }


def mappings(num_tracks: int, world_size: int) -> list[Mapping]:
    return [Mapping(world_size=world_size, num_tracks=num_tracks, rank=rank) for rank in range(world_size)]


@pytest.mark.parametrize(("num_tracks", "world_size"), WORLDS)
def test_the_ranks_parts_are_the_checkpoint(num_tracks: int, world_size: int) -> None:
    config = model_of(num_tracks)
    checkpoint = checkpoint_of(config)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in checkpoint.items()}
    placed: dict[str, set[int]] = {name: set() for name in checkpoint}
    for mapping in mappings(num_tracks, world_size):
        for name, place in placements(config, mapping).items():
            assert place.shape == tuple(checkpoint[name].shape)
            placed[name].add(mapping.rank)
            part = cut(place, name, checkpoint[name])
            if place.zeroed:
                assert not part.any()
                continue
            rows, columns = place.rows or range(place.shape[0]), place.columns
            target = found[name][rows.start : rows.stop]
            target = target if columns is None else target[..., columns.start : columns.stop]
            assert part.shape == target.shape
            assert torch.equal(target[~target.isnan()], part[~target.isnan()])  # what several ranks hold is the same
            target.copy_(part)
    for name, tensor in checkpoint.items():
        track_idx = track_of(name)
        if track_idx is None:
            assert name in (EMBEDDING, OUTPUT_NORM, HEAD)
            assert placed[name] == set()
        else:
            assert placed[name] == set(Mapping(world_size=world_size, num_tracks=num_tracks).owners(track_idx))
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("num_tracks", "world_size"), WORLDS)
def test_a_rank_holds_the_rows_that_it_holds_in_our_engines(num_tracks: int, world_size: int) -> None:
    config = model_of(num_tracks)
    checkpoint = checkpoint_of(config)
    for mapping in mappings(num_tracks, world_size):
        places = placements(config, mapping)
        for spec, track_idx, parts in spelling(config):
            if not isinstance(spec.split, RowSplit) or track_idx not in mapping.local_tracks:
                continue
            names = [part.source_name for part in parts]
            whole = torch.cat([checkpoint[name] for name in names])
            expected = torch.full((rank_rows(spec, mapping), *whole.shape[1:]), torch.nan)
            for run in row_runs(spec, mapping, 0, len(whole)):
                expected[run.target_row : run.target_row + run.rows] = whole[run.source_row :][: run.rows]
            found = torch.cat([cut(places[name], name, checkpoint[name]) for name in names])
            assert torch.equal(found, expected), spec.name


def test_a_bias_that_follows_partial_sums_is_added_once() -> None:
    config, name = model_of(2), "model.tracks.1.layers.0.self_attn.o_proj.bias"
    bias = torch.arange(1.0, 7.0)
    parts = [cut(placements(config, mapping)[name], name, bias) for mapping in mappings(2, 8)[4:]]
    assert torch.equal(torch.stack(parts).sum(0), bias)
    assert [bool(part.any()) for part in parts] == [True, False, False, False]


def test_names_are_the_checkpoints_but_for_what_vllm_computes_together() -> None:
    places = placements(model_of(4), Mapping(world_size=4, num_tracks=4, rank=2))
    layer = "model.tracks.2.layers.1"
    q, up = places[f"{layer}.self_attn.q_proj.weight"], places[f"{layer}.mlp.experts.2.up_proj.weight"]
    down = places[f"{layer}.mlp.experts.0.down_proj.weight"]
    gate = places["model.tracks.2.layers.0.mlp.gate_proj.bias"]
    norm = places["model.tracks.2.segments.1.combine_norm.weight"]
    assert (q.module, q.parameter, q.shard) == (f"{layer}.self_attn.qkv_proj", "weight", "q")
    assert (gate.module, gate.parameter, gate.shard) == ("model.tracks.2.layers.0.mlp.gate_up_proj", "bias", 0)
    assert (up.module, up.parameter, up.shard, up.expert) == (f"{layer}.mlp.experts", "w13_weight", "w3", 2)
    assert (down.parameter, down.shard, down.expert) == ("w2_weight", "w2", 0)
    assert (norm.module, norm.parameter, norm.shard) == ("model.tracks.2.segments.1.combine_norm", "weight", None)
