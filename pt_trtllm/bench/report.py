"""What was measured, as plain data and as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt_trtllm.bench.numbers import Spread
from pt_trtllm.bench.steps import Bar, StepTimes
from pt_trtllm.checkpoint.artifact import replace_file


@dataclass(frozen=True, kw_only=True)
class DecodeBandwidth:
    """What decoding reads, against what the machine reads."""

    weight_bytes_per_step: int
    kv_bytes_per_step: int
    """Of the average length of the past."""
    gb_per_s: float
    """All bytes of a step over the median time between tokens."""
    share_of_machine: float
    """Of the bandwidth measured beside it with as many processes."""


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """One engine. Keys of dictionaries are prompt lengths, batch sizes, or names of phases."""

    name: str
    world_size: int
    num_tracks: int
    num_layers: int
    sync_interval: int
    """D; of one track it means nothing."""
    dtype: str
    quantization: str
    parameters: int
    engine_bytes: int
    load_s: float
    ttft_ms: dict[str, Spread]
    tpot_ms: dict[str, Spread]
    prefill_tflop_per_s: dict[str, float]
    """Matrix products of the layers (not attention's own) over the median time to the first token."""
    decode_tokens_per_s: dict[str, float]
    """Batch size over the median time per token."""
    tokens_per_s: Spread | None
    """Generated tokens of the mix."""
    requests_per_s: Spread | None
    mix_ttft_ms: Spread | None
    mix_latency_ms: Spread | None
    forward_passes: int
    collectives_per_pass: dict[str, int]
    """Counted by the communicator."""
    collectives_planned: dict[str, int]
    """L/D fusions, or 2L all-reduces; one gather of logits."""
    collective_share: dict[str, float]
    """Of the time of forward passes, on rank 0, waiting included. Decoding begins with its prompts."""
    own_work_us: dict[str, float]
    """Of rank 0 per pass: outside forward pass and broadcast."""
    decode_steps: dict[str, StepTimes]
    """From a second, traced run; empty without one."""
    timeline: dict[str, tuple[Bar, ...]]
    """Rank -> a few decode steps of batch 1, of the traced run."""
    peak_rss_mb: list[float]
    """Per rank of this host; mapped weights count."""
    decode_bandwidth: dict[str, DecodeBandwidth]
    machine_read_gb_per_s: Spread
    ratios: dict[str, float] = field(default_factory=dict)
    """To the first engine, by row."""


@dataclass(frozen=True, kw_only=True)
class LinkReport:
    """All engines, one rank in each network namespace, over a link that delays."""

    delay: str
    """One way, as asked for."""
    how: str
    """Who delays: netem (the kernel), or a relay process."""
    round_trip_us: tuple[float, float]
    """Of 64 bytes over TCP on the idle link, before and after."""
    complete: bool
    repeats_done: int
    engines: tuple[EngineReport, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """When, where and how something was measured."""

    command: str
    date: str
    """UTC."""
    seconds: float
    complete: bool
    """False: --max-seconds ended it early."""
    repeats_done: int
    hardware: dict[str, Any]
    versions: dict[str, str]
    load_average: tuple[float, float]
    """Of one minute, before and after: other work on the machine shows here."""
    workload: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write_json(self, target: Path) -> None:
        with replace_file(target) as path:
            path.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Report(Run):
    engines: tuple[EngineReport, ...]
    links: tuple[LinkReport, ...] = ()
    """The same workload over slower links."""
