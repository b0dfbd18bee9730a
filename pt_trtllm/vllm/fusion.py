"""The meeting of tracks: what makes a PT model one model, and the only communication between whole tracks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import GroupCoordinator, get_world_group, init_model_parallel_group

from pt_trtllm.mapping import Mapping


class TrackFusion(nn.Module):
    """Mean or sum over all tracks of all ranks: local tracks first, then one all-reduce."""

    def __init__(self, mapping: Mapping, op: str) -> None:
        super().__init__()
        self.world_size = mapping.world_size
        # Ranks that share a track bring the same stream each, and all ranks meet: vLLM's fast all-reduce knows
        # only its tensor-parallel group.
        self.scale = 1 / (mapping.tp_size * (mapping.num_tracks if op == "mean" else 1))

    def forward(self, streams: Sequence[torch.Tensor]) -> torch.Tensor:
        """[tokens, hidden] of every local track to one. Summed in float32 and scaled before it is rounded."""
        total = streams[0].float()
        for stream in streams[1:]:
            total = total + stream.float()
        hidden = (total * self.scale).to(streams[0].dtype)
        return tensor_model_parallel_all_reduce(hidden) if self.world_size > 1 else hidden


def track_group(mapping: Mapping) -> GroupCoordinator | None:
    """The ranks that share this rank's track; None where each has whole ones. Collective over the whole world.

    vLLM's fast all-reduces are given to groups whose name begins with "tp".
    """
    if mapping.tp_size == 1:
        return None
    world = get_world_group()
    groups = [
        [first + rank for rank in mapping.for_rank(leader).tp_group]
        for first in range(0, world.world_size, mapping.world_size)  # vLLM numbers a tensor-parallel group in a row
        for leader in range(0, mapping.world_size, mapping.tp_size)
    ]
    backend = torch.distributed.get_backend(get_tp_group().device_group)
    return init_model_parallel_group(groups, world.local_rank, backend, group_name="tp")
