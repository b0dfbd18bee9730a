"""What single steps were made of, from the spans of a traced run: one sequence of laps per step and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pt_trtllm.bench.numbers import Spread, percentile
from pt_trtllm.mapping import SYNC_KINDS
from pt_trtllm.native import timed
from pt_trtllm.network.native_linear import load_library
from pt_trtllm.trace import CallTimer, Span

OWN_WORK = ("messages", "draft", "schedule", "sample", "report")
"""Laps of rank 0 outside the pass that all ranks make."""
BEGINNING = ("messages", "draft", "schedule")
"""What a step starts with, in this order, where there is any of it."""
TIMELINE_STEPS = 3
EMPTY_CALLS = 20_000


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Decode steps of one batch size on rank 0. Shares are of all their time."""

    num_steps: int
    step_ms: Spread
    own_work_us: Spread
    """Of rank 0 outside broadcast and forward pass."""
    kernel_share: float
    """Inside native kernels: the cost of an empty call is taken off each."""
    collective_share: float
    """Collectives and the broadcast, waiting for slower ranks included."""
    other_share: float
    """The rest: Python, sampling, small operations of PyTorch."""
    kernel_calls: float
    """Per step."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A piece of a timeline, in microseconds from its beginning."""

    name: str
    start: float
    duration: float


def decode_steps(spans: Sequence[Span], batch: int) -> list[list[Span]]:
    """Steps of rank 0 that computed one token for each of `batch` sequences: all their spans."""
    return [step for run in _runs(spans, batch) for step in run]


def _runs(spans: Sequence[Span], batch: int) -> list[list[list[Span]]]:
    """The same steps as they followed one another: another step between two of them ends a run."""
    runs: list[list[list[Span]]] = [[]]
    current: list[Span] = []
    for span in spans:
        goes_on = span.name != "messages" and current and current[-1].name in BEGINNING
        if span.name in BEGINNING and not goes_on:
            current = []
        current.append(span)
        if span.name == "sample":
            if any(s.name == "forward" and s.tokens == batch for s in current):
                runs[-1].append(current)
            else:
                runs.append([])
            current = []
    return [run for run in runs if run]


def step_times(steps: Sequence[Sequence[Span]], call_s: float) -> StepTimes | None:
    """None without steps. `call_s`: what a native call costs that does nothing."""
    if not steps:
        return None
    lengths = [_sum(step, *OWN_WORK, "broadcast", "forward") for step in steps]
    own = [_sum(step, *OWN_WORK) for step in steps]
    calls = sum(span.kernel_calls for step in steps for span in step)
    total = sum(lengths)
    kernels = max(0.0, sum(span.kernel_s for step in steps for span in step) - calls * call_s) / total
    collectives = sum(_sum(step, *SYNC_KINDS, "broadcast") for step in steps) / total
    return StepTimes(
        num_steps=len(steps),
        step_ms=Spread.of(lengths, scale=1e3),
        own_work_us=Spread.of(own, scale=1e6),
        kernel_share=kernels,
        collective_share=collectives,
        other_share=1 - kernels - collectives,
        kernel_calls=calls / len(steps),
    )


def timeline(ranks: dict[str, list[Span]], batch: int) -> dict[str, tuple[Bar, ...]]:
    """Rank -> bars of a few decode steps in a row, from the middle of the longest row."""
    steps = max(_runs(next(iter(ranks.values()), []), batch), key=len, default=[])
    if not steps:
        return {}
    middle = max(0, (len(steps) - TIMELINE_STEPS) // 2)
    shown = steps[middle : middle + TIMELINE_STEPS]
    begin, end = shown[0][0].start, shown[-1][-1].end
    return {
        rank: tuple(
            Bar(
                name=span.name,
                start=(max(span.start, begin) - begin) * 1e6,
                duration=(min(span.end, end) - max(span.start, begin)) * 1e6,
            )
            for span in sorted(spans, key=lambda span: (span.start, -span.end))
            if span.end > begin and span.start < end
        )
        for rank, spans in ranks.items()
    }


def empty_call_s() -> float:
    """Median time that a timed call of a native function takes which does nothing."""
    timer, times = CallTimer(), []
    call = timed(load_library().pt_linear_abi_version, timer)
    for _ in range(EMPTY_CALLS):
        before = timer.seconds
        call()
        times.append(timer.seconds - before)
    return percentile(times, 50)


def _sum(step: Sequence[Span], *names: str) -> float:
    return sum(span.end - span.start for span in step if span.name in names)
