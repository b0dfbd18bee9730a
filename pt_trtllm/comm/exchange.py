"""How ranks swap a few bytes while something is set up between them: memory handles, addresses, agreements."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pt_trtllm.comm.track_fusion import ShmGroup

Exchange = Callable[[bytes], list[bytes]]
"""Called by all ranks with equally many bytes; returns everybody's, in rank order."""


def over_shared_memory(group: ShmGroup) -> Exchange:
    """Through the group of ranks that a communicator already has on this host."""

    def exchange(mine: bytes) -> list[bytes]:
        row = torch.frombuffer(bytearray(mine), dtype=torch.uint8).view(1, -1)
        gathered = group.gather(row, root=0)
        everyone = torch.empty((1, group.size * len(mine)), dtype=torch.uint8) if gathered is None else gathered
        group.broadcast(everyone, root=0)
        whole = everyone.numpy().tobytes()
        return [whole[start : start + len(mine)] for start in range(0, len(whole), len(mine))]

    return exchange


def over_process_group(group: torch.distributed.ProcessGroup) -> Exchange:
    """Through a process group of torch that moves tensors of processors (gloo)."""
    size = torch.distributed.get_world_size(group)

    def exchange(mine: bytes) -> list[bytes]:
        row = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        rows = [torch.empty_like(row) for _ in range(size)]
        torch.distributed.all_gather(rows, row, group=group)
        return [each.numpy().tobytes() for each in rows]

    return exchange
