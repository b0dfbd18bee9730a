"""What was measured in vLLM and beside it, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pt_trtllm.bench.numbers import Spread
from pt_trtllm.bench.report import Run

LLAMA = "Llama"


@dataclass(frozen=True, kw_only=True)
class SideReport:
    """One model in one software. Keys of dictionaries are prompt lengths and batch sizes."""

    software: str
    """vLLM, or this project's own engine."""
    model: str
    """Llama, or PT with its D: what this one is compared to is the Llama in the same software."""
    num_layers: int
    num_tracks: int
    sync_interval: int
    """D; of one track it means nothing."""
    parameters: int
    load_s: float
    ttft_ms: dict[str, Spread]
    tpot_ms: dict[str, Spread]
    tokens_per_s: Spread | None
    """Generated tokens of the mix."""
    requests_per_s: Spread | None
    mix_ttft_ms: Spread | None
    mix_latency_ms: Spread | None
    all_reduces: float
    """Counted, per pass."""
    gathers: float
    """Of logits."""
    ratios: dict[str, float] = field(default_factory=dict)
    """To the Llama in the same software, by row."""

    @property
    def name(self) -> str:
        return f"{self.software}: {self.model}"


@dataclass(frozen=True, kw_only=True)
class SideLink:
    """All of them with one rank in each network namespace."""

    delay: str
    """One way, as asked for."""
    how: str
    round_trip_us: tuple[float, float]
    """Of 64 bytes over TCP on the idle link, before and after."""
    repeats_done: int
    engines: tuple[SideReport, ...]


@dataclass(frozen=True, kw_only=True)
class VllmReport(Run):
    compiled: bool
    """Whether vLLM compiled the models, as it does unless told otherwise."""
    vllm_arguments: dict[str, Any]
    engines: tuple[SideReport, ...]
    links: tuple[SideLink, ...] = ()


def llama_of(engines: Sequence[SideReport], index: int) -> int:
    """Index of what an engine is compared to: itself where its software runs no Llama."""
    found = [i for i, e in enumerate(engines) if e.software == engines[index].software and e.model == LLAMA]
    return found[0] if found else index
