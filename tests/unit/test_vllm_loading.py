"""Filling a rank's parameters: with loaders like vLLM's, every one is filled, and what is wrong is said together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pt_trtllm.checkpoint.sources.base import part_shape
from pt_trtllm.checkpoint.sources.pt import spelling
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import CheckpointError
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.loading import cut, load_weights
from pt_trtllm.vllm.weights import EMBEDDING, HEAD, OUTPUT_NORM, placements

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {
    "vocab_size": 7, "num_hidden_layers": 2, "sync_interval": 1, "hidden_size": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2, "intermediate_size": 8, "moe_intermediate_size": 4, "num_experts": 2,
    "num_experts_per_tok": 1, "feed_forward_pattern": ("dense", "sparse"), "mlp_bias": True, "num_tracks": 2,
}  # fmt: skip
CONFIG = ModelConfig(**SMALL)
TIED = ModelConfig(**SMALL, tie_word_embeddings=True)
BESIDE = {"w1": 0, "w3": 1, "w2": 0}


class Packed(nn.Parameter):
    """As vLLM's packed parameters are: filled part by part. Here the parts are kept, by the names of their places."""

    def weight_loader(self, parameter: Packed, tensor: torch.Tensor, *place: object, **named: object) -> None:
        assert parameter is self
        parts = self.__dict__.setdefault("parts", {})
        parts[tuple(part for part in (*place, *named.values()) if not isinstance(part, str) or "." not in part)] = (
            tensor
        )


def rank_model(config: ModelConfig, mapping: Mapping) -> nn.Module:
    """Modules with the names that a rank of the vLLM model has."""
    places = placements(config, mapping)
    parameters: dict[str, nn.Parameter] = {}
    for name, place in places.items():
        below = f"{place.module}.routed" if place.expert is not None else place.module
        packed = place.shard is not None
        shape = cut(place, name, torch.empty(place.shape)).shape
        parameters[f"{below}.{place.parameter}"] = (
            Packed(torch.empty(0)) if packed else nn.Parameter(torch.full(shape, torch.nan))
        )
    hidden = (config.vocab_size, config.hidden_size)
    parameters[EMBEDDING] = nn.Parameter(torch.full(hidden, torch.nan))
    parameters[OUTPUT_NORM] = nn.Parameter(torch.full(hidden[1:], torch.nan))
    if mapping.world_size > 1 or not config.tie_word_embeddings:
        parameters[HEAD] = nn.Parameter(torch.full(hidden, torch.nan))
    model = nn.Module()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        module = model
        for step in path:
            if step not in dict(module.named_children()):
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(last, parameter)
    return model


def checkpoint_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        part.source_name: torch.randn(part_shape(spec, part), generator=generator)
        for spec, _, parts in spelling(config)
        for part in parts
    }


def mapping_of(rank: int, world_size: int) -> Mapping:
    return Mapping(world_size=world_size, num_tracks=2, rank=rank)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (3, 4)])
def test_every_parameter_is_filled(rank: int, world_size: int) -> None:
    mapping, checkpoint = mapping_of(rank, world_size), checkpoint_of(CONFIG)
    model, places = rank_model(CONFIG, mapping), placements(CONFIG, mapping)
    parameters = dict(model.named_parameters())
    assert load_weights(model, CONFIG, mapping, checkpoint.items()) == set(parameters)
    for name, place in places.items():
        expected = cut(place, name, checkpoint[name])
        if place.expert is not None:
            parts = parameters[f"{place.module}.routed.{place.parameter}"].parts
            assert torch.equal(parts[place.shard, place.expert], expected)
        elif place.shard is not None:
            assert torch.equal(parameters[f"{place.module}.{place.parameter}"].parts[(place.shard,)], expected)
        else:
            assert torch.equal(parameters[name], expected)
    for name in (EMBEDDING, OUTPUT_NORM, HEAD):
        assert torch.equal(parameters[name], checkpoint[name])


def message_of(checkpoint: dict[str, torch.Tensor], config: ModelConfig = CONFIG) -> str:
    mapping = mapping_of(0, 2)
    with pytest.raises(CheckpointError) as raised:
        load_weights(rank_model(config, mapping), config, mapping, checkpoint.items())
    return str(raised.value)


def test_what_is_wrong_is_said_together() -> None:
    checkpoint = checkpoint_of(CONFIG)
    layer = "model.tracks.0.layers.0"
    del checkpoint[f"{layer}.self_attn.k_proj.weight"]
    checkpoint[f"{layer}.mlp.up_proj.weight"] = torch.zeros(3, 6)
    checkpoint[f"{layer}.mlp.side_proj.weight"] = torch.zeros(1)
    assert message_of(checkpoint) == (
        f"checkpoint: {layer}.mlp.up_proj.weight is [3, 6], expected [8, 6]; {layer}.mlp.side_proj.weight is not a "
        f"tensor of this model; {layer}.self_attn.k_proj.weight is missing"
    )


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, OUTPUT_NORM])
def test_what_all_tracks_share_has_its_shape(name: str) -> None:
    assert f"{name} is [1], expected [" in message_of({**checkpoint_of(CONFIG), name: torch.zeros(1)})


def test_of_many_the_first_are_named() -> None:
    checkpoint = {name: tensor for name, tensor in checkpoint_of(CONFIG).items() if "proj" not in name}
    assert message_of(checkpoint).endswith(" more")


def test_a_tensor_of_a_track_that_the_model_lacks_is_unknown() -> None:
    extra = "model.tracks.2.layers.0.mlp.up_proj.weight"
    assert f"{extra} is not a tensor" in message_of({**checkpoint_of(CONFIG), extra: torch.zeros(8, 6)})


def test_a_missing_head_is_missing_where_it_is_not_the_embedding() -> None:
    checkpoint = checkpoint_of(CONFIG)
    del checkpoint[HEAD]
    assert message_of(checkpoint) == f"checkpoint: {HEAD} is missing"


def test_a_tied_head_is_the_embedding_on_every_rank() -> None:
    checkpoint = checkpoint_of(TIED)
    for world_size in (1, 2):
        mapping = mapping_of(0, world_size)
        for given in (checkpoint, {HEAD: checkpoint[EMBEDDING], **checkpoint}):
            model = rank_model(TIED, mapping)
            load_weights(model, TIED, mapping, given.items())
            head = dict(model.named_parameters()).get(HEAD)
            assert head is None if world_size == 1 else torch.equal(head, checkpoint[EMBEDDING])


def test_a_tied_model_with_another_head_is_refused() -> None:
    checkpoint = {**checkpoint_of(TIED), HEAD: torch.zeros(7, 6)}
    assert "tie_word_embeddings" in message_of(checkpoint, TIED)
