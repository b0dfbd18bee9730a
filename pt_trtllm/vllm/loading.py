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
from pt_trtllm.vllm.quantised import describe, is_of_router, needed, place_of, share_of
from pt_trtllm.vllm.weights import EMBEDDING, HEAD, OUTPUT_NORM, Placement, placements, track_of

SHOWN = 4
NO_WEIGHTS = ".rotary_emb.inv_freq"
"""Tables that some tools save with the weights; every engine computes its own."""
HEAD_MODULE = HEAD.removesuffix("weight")
Homes = dict[tuple[str, str], str]


def load_weights(
    model: nn.Module, config: ModelConfig, mapping: Mapping, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """Returns the names of the parameters that were filled."""
    parameters = dict(model.named_parameters())
    places, homes = placements(config, mapping), _homes(parameters)
    shared = {EMBEDDING, OUTPUT_NORM}
    if not config.tie_word_embeddings:
        shared |= {name for name in parameters if name.startswith(HEAD_MODULE)}
    missing, problems, filled = _expected(places, parameters, homes) | shared, [], set()
    repeated_head: torch.Tensor | None = None
    for name, tensor in weights:
        missing.discard(name)
        place = places.get(name) or place_of(name, places)
        try:
            if place is not None:
                filled.add(_fill(parameters, homes, place, name, tensor))
            elif name in shared:
                filled |= _fill_shared(parameters, config, name, tensor)
            elif name == HEAD:
                repeated_head = tensor
            elif not name.endswith(NO_WEIGHTS) and not _is_elsewhere(config, mapping, name):
                raise CheckpointError(f"{name} is not a tensor of this model{_of_router(name)}")
        except CheckpointError as error:
            problems.append(str(error))
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


def cut(place: Placement, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a checkpoint's tensor that this rank holds."""
    for dim, part in ((0, place.rows), (1, place.columns)):
        if part is not None and dim < tensor.dim():
            kept = _kept(place, name, part, dim, tensor.shape[dim])
            tensor = tensor.narrow(dim, kept.start, len(kept))
    return torch.zeros_like(tensor) if place.zeroed else tensor


def _kept(place: Placement, name: str, part: range, dim: int, stored: int) -> range:
    if place.matrix is None or place.shape is not None:
        return part
    kept = share_of(part, place.matrix[dim], stored)
    if kept is None:
        raise CheckpointError(
            f"{name} has {stored} entries for {place.matrix[dim]} {('rows', 'columns')[dim]}, and ranks that share a "
            "track would share an entry, too; use as many ranks as there are tracks, or fewer"
        )
    return kept


def _expected(places: dict[str, Placement], parameters: dict[str, Any], homes: Homes) -> set[str]:
    """The checkpoint's tensors, without which this rank's parameters are not whole."""
    of_module: dict[str, list[str]] = {}
    for name in parameters:
        module, _, parameter = name.rpartition(".")
        of_module.setdefault(module, []).append(parameter)
    return {
        tensor
        for name, place in places.items()
        for tensor in needed(name, place, of_module.get(_home(homes, place), ()))
    }


def _homes(parameters: Iterable[str]) -> Homes:
    """Where vLLM keeps parameters of experts: somewhere below the module that it makes of them."""
    homes = {}
    for name in parameters:
        module, _, parameter = name.rpartition(".")
        experts, found, _ = f"{module}.".partition(".experts.")
        if found:
            homes[f"{experts}.experts", parameter.partition("_")[0]] = module
    return homes


def _home(homes: Homes, place: Placement) -> str:
    """The module of vLLM's that has the parameter."""
    return homes.get((place.module, place.parameter.partition("_")[0]), place.module)


def _fill(parameters: dict[str, Any], homes: Homes, place: Placement, source: str, tensor: torch.Tensor) -> str:
    if place.shape is not None and tuple(tensor.shape) != place.shape:
        raise CheckpointError(f"{source} is {describe(tensor.shape)}, expected {describe(place.shape)}")
    tensor = cut(place, source, tensor)
    name = f"{_home(homes, place)}.{place.parameter}"
    parameter: Any = parameters.get(name)
    if parameter is None:
        raise CheckpointError(
            f"{source} has no place: config.json's quantization_config does not say that this module is quantised so"
        )
    if parameter.dtype.is_floating_point and not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{source} is {tensor.dtype}, but its module is not quantised by quantization_config")
    try:
        if place.expert is not None:
            parameter.weight_loader(parameter, tensor, name, shard_id=place.shard, expert_id=place.expert)
        elif place.shard is not None:
            parameter.weight_loader(parameter, tensor, place.shard)
        else:
            _load_whole(parameter, tensor)
    except (AssertionError, RuntimeError) as error:  # how vLLM's loaders say that a shape is wrong
        if parameter.is_meta:
            raise  # vLLM quantises it while it is loaded, and that has failed
        raise CheckpointError(
            f"{source} is {describe(tensor.shape)} on this rank, which vLLM's {name} of {describe(parameter.shape)} "
            f"does not take{f': {error}' if str(error) else ''}"
        ) from error
    return name


def _fill_shared(parameters: dict[str, Any], config: ModelConfig, name: str, tensor: torch.Tensor) -> set[str]:
    table = (config.vocab_size, config.hidden_size)
    shapes = {EMBEDDING: table, OUTPUT_NORM: (config.hidden_size,)}
    if not any(other.startswith(HEAD_MODULE) and other != HEAD for other in parameters):
        shapes[HEAD] = table  # one that is quantised is stored as its method likes
    if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
        raise CheckpointError(f"{name} is {describe(tensor.shape)}, expected {describe(shapes[name])}")
    names = {name}
    if name == EMBEDDING and config.tie_word_embeddings and HEAD in parameters:
        names.add(HEAD)  # a head of several ranks is a shard of its own
    for each in names:
        _load_whole(parameters[each], tensor)
    return names


def _is_embedding(embedding: torch.Tensor, head: torch.Tensor) -> bool:
    if embedding.is_meta:
        return True  # vLLM loads new weights into a running engine, and has not made them yet
    rows = embedding[: head.shape[0]]  # vLLM pads the vocabulary
    return rows.shape == head.shape and torch.equal(rows, head.to(rows))


def _of_router(name: str) -> str:
    return " (a router is never quantised: list re:.*mlp.router under `ignore`)" if is_of_router(name) else ""


def _load_whole(parameter: Any, tensor: torch.Tensor) -> None:
    loader = getattr(parameter, "weight_loader", None)
    if loader is not None:
        loader(parameter, tensor)
    else:
        parameter.data.copy_(tensor)


def _is_elsewhere(config: ModelConfig, mapping: Mapping, name: str) -> bool:
    track_idx = track_of(name)
    return track_idx is not None and track_idx < config.num_tracks and track_idx not in mapping.local_tracks
