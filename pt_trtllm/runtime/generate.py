"""The loops of the ranks: rank 0 schedules and samples, the others follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pt_trtllm.comm.base import Communicator
from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.errors import CommunicationError
from pt_trtllm.mapping import SYNC_KINDS, sync_counts, sync_plan
from pt_trtllm.network.torch_ops import StepBatch
from pt_trtllm.runtime.messages import STOP, decode, encode
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.scheduler import Scheduler, Step

Progress = Callable[[int, int], None]


class Engine(Protocol):
    """One rank of any backend's engine."""

    config: EngineConfig
    comm: Communicator

    def forward(self, batch: StepBatch) -> torch.Tensor: ...


@dataclass
class GenerationStats:
    """What one call of `generate` did, counted, not assumed."""

    world_size: int
    hosts: int = 1
    forward_passes: int = 0
    sync_points_per_forward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SYNC_KINDS, 0))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    seconds_to_first_token: float = 0.0
    seconds_in_collectives: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def follow(engine: Engine) -> None:
    """Ranks above 0: run what rank 0 announces until it says stop."""
    while (batch := decode(engine.comm.broadcast(None))) is not None:
        engine.forward(batch)


def generate(
    engine: Engine, requests: SequenceABC[Request], progress: Progress = lambda done, total: None
) -> tuple[list[Sequence], GenerationStats]:
    """Rank 0: answers all requests, several at a time; releases the other ranks at the end."""
    results = _generate(engine, requests, progress)
    engine.comm.broadcast(STOP)
    return results


def _generate(
    engine: Engine, requests: SequenceABC[Request], progress: Progress
) -> tuple[list[Sequence], GenerationStats]:
    scheduler = Scheduler(engine.config.limits)
    sequences = [Sequence.start(index, request, engine.config) for index, request in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    stats = GenerationStats(
        world_size=engine.comm.world_size,
        hosts=engine.comm.num_hosts,
        prompt_tokens=sum(len(request.prompt_ids) for request in requests),
    )
    start, done = time.perf_counter(), 0
    while scheduler.has_work():
        step = scheduler.next_step()
        engine.comm.broadcast(encode(step.batch))
        _take_tokens(step, engine.forward(step.batch))
        stats.forward_passes += 1
        if step.rows and not stats.seconds_to_first_token:
            stats.seconds_to_first_token = time.perf_counter() - start
        done += len(scheduler.finish_step())
        progress(done, len(sequences))
    stats.seconds = time.perf_counter() - start
    stats.generated_tokens = sum(len(sequence.output_ids) for sequence in sequences)
    _count_syncs(engine, stats)
    return sequences, stats


def _take_tokens(step: Step, logits: torch.Tensor) -> None:
    for (sequence, decides), row in zip(step.rows, logits, strict=True):
        if sequence.request.context_logits and len(sequence.prompt_logits) < len(sequence.request.prompt_ids):
            sequence.prompt_logits.append(row.clone())
        if decides:
            sequence.accept(sequence.sampler.next_token(row, len(sequence.output_ids)))


def _count_syncs(engine: Engine, stats: GenerationStats) -> None:
    """Per-pass counts as the communicator saw them; they must be what the plan says."""
    counts, passes = engine.comm.stats.counts, stats.forward_passes
    stats.seconds_in_collectives = sum(engine.comm.stats.seconds.values())
    planned = sync_counts(sync_plan(engine.config.checkpoint.model, engine.config.mapping))
    if counts != {kind: count * passes for kind, count in planned.items()}:
        raise CommunicationError(f"{passes} passes made collectives {counts}; the plan is {planned} per pass")
    stats.sync_points_per_forward = {kind: count // max(1, passes) for kind, count in counts.items()}
