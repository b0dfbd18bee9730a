"""Where each tensor of a `pt` checkpoint goes on one rank: pure functions over the declared tensors.

The modules of the vLLM model bear the checkpoint's own names, with the tracks' numbers in the whole model, so that a
name means the same on every rank. Only projections that vLLM computes in one product have a name of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pt_trtllm.checkpoint.sources.pt import layer_prefix, locate
from pt_trtllm.checkpoint.spec import ColumnSplit, RowSplit, TensorSpec, layer_tensors
from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""vLLM's module -> the checkpoint's, in the order of its rows. vLLM's quantisation and LoRA know these names."""
SHARDS: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
EXPERT_SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
OF_A_TRACK = re.compile(r"model\.tracks\.(\d+)\.")


@dataclass(frozen=True)
class Placement:
    """What becomes of one tensor of the checkpoint on one rank."""

    module: str
    parameter: str
    shape: tuple[int, ...]
    """Expected in the checkpoint."""
    shard: str | int | None = None
    """Which part of a packed parameter it is, as vLLM's weight loaders name them."""
    expert: int | None = None
    rows: range | None = None
    """The rows that this rank keeps; None keeps all."""
    columns: range | None = None
    zeroed: bool = False
    """A bias that is added after partial sums meet: the first rank of a track brings it, the others zeros."""


def placements(config: ModelConfig, mapping: Mapping) -> dict[str, Placement]:
    """Checkpoint name -> its place, for every tensor of the tracks that this rank holds."""
    found: dict[str, Placement] = {}
    for track_idx in mapping.local_tracks:
        for layer_idx in range(config.num_hidden_layers):
            for spec in layer_tensors(config, layer_idx):
                found.update(_parts(config, mapping, spec, track_idx))
    return found


def _parts(config: ModelConfig, mapping: Mapping, spec: TensorSpec, track_idx: int) -> Iterator[tuple[str, Placement]]:
    columns = None
    if isinstance(spec.split, ColumnSplit) and mapping.tp_size > 1:
        width = spec.columns // mapping.tp_size
        columns = range(mapping.tp_rank * width, (mapping.tp_rank + 1) * width)
    sections = spec.split.sections if isinstance(spec.split, RowSplit) else ()
    for index, part in enumerate(locate(config, spec, track_idx, layer_prefix)):
        rows = None
        if sections and mapping.tp_size > 1:
            first, count = sections[index].share(mapping.tp_size, mapping.tp_rank)
            rows = range(first, first + count)
        module, parameter = part.source_name.rsplit(".", 1)
        shape = (part.rows,) if len(spec.shape) == 1 else (part.rows, spec.columns)
        zeroed = parameter == "bias" and not sections and mapping.tp_rank > 0
        expert = EXPERT.fullmatch(part.source_name)
        if expert is not None:
            place = Placement(
                expert[1], "w2_weight" if expert[3] == "down_proj" else "w13_weight", shape,
                EXPERT_SHARDS[expert[3]], int(expert[2]), rows, columns,
            )  # fmt: skip
        else:
            parent, _, own = module.rpartition(".")
            packed, shard = SHARDS.get(own, (own, None))
            place = Placement(f"{parent}.{packed}", parameter, shape, shard, None, rows, columns, zeroed)
        yield part.source_name, place


def track_of(name: str) -> int | None:
    """The track that a checkpoint's tensor belongs to; None for those that all share."""
    found = OF_A_TRACK.match(name)
    return int(found[1]) if found else None
