"""This project's own collective for vLLM's tensor-parallel group: opened once per process, then called by name."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator, in_the_same_node_as

from pt_trtllm import env
from pt_trtllm.comm import cuda_abi, torch_operator
from pt_trtllm.comm.cuda_fusion import CudaFusion
from pt_trtllm.comm.exchange import over_process_group
from pt_trtllm.comm.track_fusion import ShmGroup
from pt_trtllm.errors import CommunicationError

NAME = "vllm:tp"
"""For `torch.ops.pt_trtllm.track_fusion`. vLLM keeps compiled graphs for later processes: never to be counted up."""

TIMEOUT_S = 600.0
"""Of one wait for a peer, which may still be compiling; a rank that dies is noticed by vLLM's executor."""

Channel = CudaFusion | ShmGroup
_held: tuple[GroupCoordinator, Channel] | None = None
"""Nothing closes a channel of GPUs: that is collective, and at the end of a process nobody may be there to take part.
Its memory goes with the process."""


def open_channel() -> Channel:
    """Collective over the tensor-parallel group. The same channel for all models of this process."""
    global _held
    group = get_tp_group()
    if _held is not None and _held[0] is group:
        return _held[1]
    if _held is not None:
        torch_operator.forget(_held[1])
    if not all(in_the_same_node_as(group.cpu_group)):
        raise CommunicationError(
            "collective 'pt' reaches the ranks of one host only, and this tensor-parallel group has several: use "
            "collective 'vllm'"
        )
    if group.device.type not in ("cuda", "cpu"):
        raise CommunicationError(
            f"collective 'pt' reaches GPUs of CUDA and processors, not {group.device.type}: use collective 'vllm'"
        )
    channel = _between_gpus(group) if group.device.type == "cuda" else _between_processors(group)
    torch_operator.register(NAME, channel)
    _held = group, channel
    return channel


def _between_gpus(group: Any) -> CudaFusion:
    if not cuda_abi.load_library().pt_cuda_fusion_has_cuda():
        raise CommunicationError(
            f"collective 'pt': {cuda_abi.library_path()} was built without CUDA; build it with `pip install "
            f"pt-trtllm -C cmake.define.PT_ENABLE_CUDA=ON` (needs nvcc), or name one with CUDA in "
            f"{env.CUDA_FUSION_LIBRARY.name}, or use collective 'vllm'"
        )
    return CudaFusion(
        rank=group.rank_in_group,
        size=group.world_size,
        exchange=over_process_group(group.cpu_group),
        provider="cuda_ipc",
        device=torch.cuda.current_device(),
        timeout_s=TIMEOUT_S,
    )


def _between_processors(group: Any) -> ShmGroup:
    size, own = group.world_size, None
    if group.rank_in_group == 0:
        own = ShmGroup.create(size=size, timeout_s=TIMEOUT_S)
    name = group.broadcast_object(None if own is None else own.name, src=0)
    if own is None:
        return ShmGroup.attach(name, rank=group.rank_in_group, size=size, timeout_s=TIMEOUT_S)
    own.unlink()
    return own
