"""Tensors of quantised checkpoints: pure functions over names and shapes.

A quantised matrix is several tensors beside each other: `q_proj.weight_packed`, `q_proj.weight_scale`. Each goes where
the float `q_proj.weight` would go, to the parameter of its own name; vLLM's quantisation methods make the parameters
and know what is in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pt_trtllm.vllm.weights import HEAD, Placement

EVER_NEEDED = frozenset(
    ("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "qweight", "qzeros", "scales",
     "input_scale", "input_zero_point")
)  # fmt: skip
"""Parameters that no method can do without once it has made them. Others, such as `weight_shape`, may be absent."""
NOT_CUT = frozenset(("weight_shape", "input_scale", "input_zero_point"))
"""Of a whole matrix, whatever part of it a rank holds."""
SPLIT_METHODS = ("compressed-tensors", "fp8", "online")
"""Of vLLM's methods, those that store a matrix as [out, in], as `share_of` cuts it, or that quantise while loading."""


def is_plain(vllm_config: Any) -> bool:
    """Whether every projection is a float matrix and stays one: nothing is quantised, and no adapter can come."""
    return vllm_config.quant_config is None and vllm_config.lora_config is None


def place_of(name: str, places: Mapping[str, Placement]) -> Placement | None:
    """The place of a tensor that belongs to a quantised matrix; None for all others."""
    module, _, parameter = name.rpartition(".")
    place = places.get(f"{module}.weight")
    if place is None or place.matrix is None or parameter in ("weight", "bias"):
        return None
    own = f"{place.parameter.removesuffix('weight')}{parameter}"  # experts: w13_weight, so w13_weight_scale
    whole = parameter in NOT_CUT
    return dataclasses.replace(
        place, parameter=own, shape=None, rows=None if whole else place.rows, columns=None if whole else place.columns
    )


def share_of(part: range, size: int, stored: int) -> range | None:
    """Of `stored` entries that stand for `size` rows or columns, those of `part`: packed numbers, groups, blocks.

    None where the part does not end between two entries. One entry stands for all, and goes to everyone.
    """
    if stored == 1:
        return range(1)
    if part.start * stored % size or part.stop * stored % size:
        return None
    return range(part.start * stored // size, part.stop * stored // size)


def needed(name: str, place: Placement, parameters: Iterable[str]) -> list[str]:
    """The checkpoint's tensors for the matrix `name` (`....weight`), given the parameters of the module vLLM made."""
    if place.matrix is None:
        return [name]
    module, prefix = name.rpartition(".")[0], place.parameter.removesuffix("weight")
    kinds = [parameter.removeprefix(prefix) for parameter in parameters if parameter.startswith(prefix)]
    return [f"{module}.{kind}" for kind in kinds if kind in EVER_NEEDED] or [name]


def is_of_router(name: str) -> bool:
    return ".mlp.router." in name


def tied_head_problem(head_parameters: Iterable[str]) -> str | None:
    """A head that is the embedding cannot have numbers of its own."""
    if set(head_parameters) <= {"weight", "bias"}:
        return None
    return (
        "a quantised head that config.json ties to the embedding: set tie_word_embeddings to false there, or add "
        f"{HEAD.removesuffix('.weight')} to the quantisation's ignore list"
    )


def split_problem(method: str | None, tp_size: int) -> str | None:
    """Why a track that is quantised by `method` cannot be split over ranks."""
    if method is None or tp_size == 1 or method in SPLIT_METHODS:
        return None
    return (
        f"tracks split over {tp_size} ranks each in a checkpoint quantised by {method!r} (only by "
        f"{', '.join(SPLIT_METHODS)}): use as many ranks as there are tracks, or fewer"
    )


def kv_scales_problem(quant_config: Any) -> str | None:
    """One attention serves all local tracks, and takes one scale."""
    if getattr(quant_config, "kv_cache_scheme", None) is None:
        return None
    return (
        "scales of the KV cache in a checkpoint (kv_cache_scheme): set it to null in config.json, and use "
        "--kv-cache-dtype, if a small cache is wanted"
    )


def describe(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
