"""A world of one rank: nothing to wait for."""

from __future__ import annotations

import torch

from pt_trtllm.comm.base import CommStats


class LocalCommunicator:
    rank = 0
    world_size = 1
    num_hosts = 1

    def __init__(self) -> None:
        self.stats = CommStats()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def track_fusion(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None = None) -> torch.Tensor:
        return hidden

    def gather_logits(self, shard: torch.Tensor) -> torch.Tensor | None:
        return shard

    def broadcast(self, payload: bytes | None) -> bytes:
        assert payload is not None
        return payload

    def collect(self, payload: bytes) -> list[bytes]:
        return [payload]

    def barrier(self) -> None:
        return

    def abort(self, reason: str) -> None:
        return

    def close(self) -> None:
        return
