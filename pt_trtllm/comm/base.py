"""What an engine needs from the other ranks, and the count of what it really did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pt_trtllm.mapping import SYNC_KINDS, SyncKind


@dataclass
class CommStats:
    """Collectives since the last reset, by kind, with the time spent in them (waiting included)."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SYNC_KINDS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SYNC_KINDS, 0.0))
    on_span: Callable[[str, float, float], None] | None = None
    """Told kind, start and end of each."""

    @contextmanager
    def measure(self, kind: SyncKind) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.counts[kind] += 1
        self.seconds[kind] += end - start
        if self.on_span is not None:
            self.on_span(kind, start, end)


class Communicator(Protocol):
    """One rank's view of the world. Collectives are called by all ranks of their group in the same order."""

    rank: int
    world_size: int
    num_hosts: int
    stats: CommStats

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that share this rank's track."""
        ...

    def track_fusion(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None = None) -> torch.Tensor:
        """Mean or sum of [tokens, hidden] over the fusion group; bit-identical on all its ranks.

        `base`, like hidden and the same on all ranks, is what a communicator may send differences to.
        """
        ...

    def gather_logits(self, shard: torch.Tensor) -> torch.Tensor | None:
        """[rows, vocabulary shard] of every rank side by side on rank 0; None elsewhere."""
        ...

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0's payload on every rank; waits without a time limit, asleep."""
        ...

    def collect(self, payload: bytes) -> list[bytes]:
        """Every rank's payload on rank 0, nothing elsewhere: for the end of a world, not for steps."""
        ...

    def barrier(self) -> None: ...

    def abort(self, reason: str) -> None:
        """Ends every other rank's waits with `reason`."""
        ...

    def close(self) -> None: ...
