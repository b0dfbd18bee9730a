"""Collectives among the operations that vLLM's ranks ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pt_trtllm.errors import CommunicationError

ALL_REDUCES = ("_C::shm_allreduce", "c10d::allreduce_")
GATHERS = ("_C::shm_all_gather", "_C::shm_gather", "c10d::_allgather_base_", "c10d::gather_")
SHARED_MEMORY = "_C::shm_"


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """Per forward pass, on every rank."""

    all_reduces: float
    gathers: float
    """Of logits."""
    shared_memory: bool
    """Whether any of them went through it."""


def collectives(ranks: Sequence[Mapping[str, int]], passes: int) -> Collectives:
    """From the operations of every rank in as many passes. Raises when ranks differ."""
    found = [
        Collectives(
            all_reduces=sum(operations.get(name, 0) for name in ALL_REDUCES) / passes,
            gathers=sum(operations.get(name, 0) for name in GATHERS) / passes,
            shared_memory=any(name.startswith(SHARED_MEMORY) for name in operations),
        )
        for operations in ranks
    ]
    if len(set(found)) != 1:
        raise CommunicationError(f"ranks of vLLM ran different collectives: {found}")
    return found[0]
