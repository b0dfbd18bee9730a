"""The meeting of tracks: what makes a PT model one model, and the only communication between whole tracks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import GroupCoordinator, get_world_group, init_model_parallel_group
from vllm.model_executor.layers.layernorm import RMSNorm

from pt_trtllm.comm.cuda_fusion import CudaFusion
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.channel import NAME, Channel, open_channel

Fused = tuple[torch.Tensor, list[torch.Tensor] | None]
"""The common hidden states, and their norms where these came with them: one per norm that follows."""


class TrackFusion(nn.Module):
    """Mean or sum over all tracks of all ranks: local tracks first, then one all-reduce of vLLM's."""

    def __init__(self, mapping: Mapping, op: str) -> None:
        super().__init__()
        self.world_size = mapping.world_size
        # Ranks that share a track bring the same stream each, and all ranks meet: vLLM's fast all-reduce knows
        # only its tensor-parallel group.
        self.scale = 1 / (mapping.tp_size * (mapping.num_tracks if op == "mean" else 1))

    def forward(self, streams: Sequence[torch.Tensor], norms: Sequence[nn.Module | None]) -> Fused:
        """[tokens, hidden] of every local track to one. `norms` are what follows on this rank."""
        hidden = _local_sum(streams, self.scale)
        return tensor_model_parallel_all_reduce(hidden) if self.world_size > 1 else hidden, None

    def check(self) -> None:
        """Raises what ended the communication of earlier passes. vLLM sees to that itself."""


class ChannelFusion(nn.Module):
    """The same through a channel of our own, which makes the norms that follow in the same call."""

    def __init__(self, mapping: Mapping, op: str, channel: Channel) -> None:
        super().__init__()
        self.op, self.channel = op, channel
        # The channel scales a mean, after its one rounding-free sum. All ranks take part, see TrackFusion.
        self.scale = 1 / (mapping.tracks_per_rank if op == "mean" else mapping.tp_size)

    def forward(self, streams: Sequence[torch.Tensor], norms: Sequence[nn.Module | None]) -> Fused:
        fuse, plain = torch.ops.pt_trtllm.track_fusion, [norm for norm in norms if isinstance(norm, RMSNorm)]
        hidden = _local_sum(streams, self.scale)
        if len(plain) < len(norms):
            return fuse(hidden, NAME, self.op)[0], None
        weights = [norm.weight for norm in plain]
        gamma = weights[0] if len(weights) == 1 else torch.stack(weights)
        hidden, normed = fuse(hidden, NAME, self.op, None, gamma, plain[0].variance_epsilon)
        return hidden, [normed] if len(weights) == 1 else list(normed.unbind(0))

    def check(self) -> None:
        """A replayed CUDA graph tells nobody that a wait in it was given up, and goes on with zeros."""
        if isinstance(self.channel, CudaFusion):
            self.channel.check_status()


def make_fusion(mapping: Mapping, op: str, collective: str) -> TrackFusion | ChannelFusion:
    """`collective` is the plugin's option. Collective over the tensor-parallel group, when it opens a channel."""
    if collective == "vllm" or mapping.world_size == 1:
        return TrackFusion(mapping, op)
    return ChannelFusion(mapping, op, open_channel())


def _local_sum(streams: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """Summed in float32 and scaled before it is rounded."""
    if len(streams) == 1 and scale == 1:
        return streams[0]
    total = streams[0].float()
    for stream in streams[1:]:
        total = total + stream.float()
    return (total * scale).to(streams[0].dtype)


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
