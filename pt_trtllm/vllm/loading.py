"""Fills this rank's parameters from a checkpoint's tensors, each cut to what the rank holds before vLLM's own loaders
see it; and says together what is missing, unknown or of another shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import CheckpointError
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.weights import EMBEDDING, HEAD, OUTPUT_NORM, Placement, placements, track_of

SHOWN = 4
NO_WEIGHTS = ".rotary_emb.inv_freq"
"""Tables that some tools save with the weights; every engine computes its own."""


def load_weights(
    model: nn.Module, config: ModelConfig, mapping: Mapping, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """Returns the names of the parameters that were filled."""
    parameters = dict(model.named_parameters())
    places = placements(config, mapping)
    shared = {EMBEDDING, OUTPUT_NORM} if config.tie_word_embeddings else {EMBEDDING, OUTPUT_NORM, HEAD}
    missing, problems, filled = set(places) | shared, [], set()
    repeated_head: torch.Tensor | None = None
    for name, tensor in weights:
        if name in places:
            place = places[name]
            if tuple(tensor.shape) != place.shape:
                problems.append(f"{name} is {list(tensor.shape)}, expected {list(place.shape)}")
            else:
                filled.add(_fill(parameters, place, tensor))
        elif name in shared:
            filled |= _fill_shared(parameters, config, name, tensor)
        elif name == HEAD:
            repeated_head = tensor
        elif not name.endswith(NO_WEIGHTS) and not _is_elsewhere(config, mapping, name):
            problems.append(f"{name} is not a tensor of this model")
        missing.discard(name)
    problems += [f"{name} is missing" for name in sorted(missing)]
    if repeated_head is not None and not problems and not _is_embedding(parameters[EMBEDDING], repeated_head):
        problems.append(
            f"{HEAD} is not the embedding, but config.json says tie_word_embeddings; set it to false there, or write "
            "the folder anew with `pt-trtllm export`"
        )
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"checkpoint: {'; '.join(problems[:SHOWN])}{more}")
    return filled


def cut(place: Placement, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a checkpoint's tensor that this rank holds."""
    if place.rows is not None:
        tensor = tensor[place.rows.start : place.rows.stop]
    if place.columns is not None:
        tensor = tensor[..., place.columns.start : place.columns.stop]
    return torch.zeros_like(tensor) if place.zeroed else tensor


def _fill(parameters: dict[str, Any], place: Placement, tensor: torch.Tensor) -> str:
    tensor = cut(place, tensor)
    if place.expert is not None:
        # vLLM keeps the experts somewhere below the module that it makes of them.
        name = next(
            name for name in parameters if name.startswith(f"{place.module}.") and name.endswith(place.parameter)
        )
        parameter = parameters[name]
        parameter.weight_loader(parameter, tensor, name, shard_id=place.shard, expert_id=place.expert)
        return name
    name = f"{place.module}.{place.parameter}"
    parameter = parameters[name]
    if place.shard is not None:
        parameter.weight_loader(parameter, tensor, place.shard)
    else:
        _load_whole(parameter, tensor)
    return name


def _fill_shared(parameters: dict[str, Any], config: ModelConfig, name: str, tensor: torch.Tensor) -> set[str]:
    names = {name}
    if name == EMBEDDING and config.tie_word_embeddings and HEAD in parameters:
        names.add(HEAD)  # a head of several ranks is a shard of its own
    for each in names:
        _load_whole(parameters[each], tensor)
    return names


def _is_embedding(embedding: torch.Tensor, head: torch.Tensor) -> bool:
    rows = embedding[: head.shape[0]]  # vLLM pads the vocabulary
    return rows.shape == head.shape and torch.equal(rows, head.to(rows))


def _load_whole(parameter: Any, tensor: torch.Tensor) -> None:
    loader = getattr(parameter, "weight_loader", None)
    if loader is not None:
        loader(parameter, tensor)
    else:
        parameter.data.copy_(tensor)


def _is_elsewhere(config: ModelConfig, mapping: Mapping, name: str) -> bool:
    track_idx = track_of(name)
    return track_idx is not None and track_idx < config.num_tracks and track_idx not in mapping.local_tracks
