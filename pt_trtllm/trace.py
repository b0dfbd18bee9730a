"""Where a rank's time goes: sums of every kind of work always, single spans when asked for."""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

MAX_SPANS = 100_000
"""Kept per rank; older ones make room."""
PROCESSES_PER_WORLD = 1000


@dataclass
class CallTimer:
    """Time inside the calls of some native functions."""

    seconds: float = 0.0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one rank's time, in seconds of the monotonic clock: comparable between the ranks of one host."""

    name: str
    start: float
    end: float
    tokens: int = 0
    """Of a forward pass."""
    kernel_s: float = 0.0
    """Inside native kernels; 0 where they were not timed."""
    kernel_calls: int = 0


class Tracer:
    """One rank's work, cut into laps: each lasts from the end of the one before it, or from `begin`."""

    def __init__(self, max_spans: int = 0, kernels: CallTimer | None = None) -> None:
        """Without `max_spans`, only sums are kept: a lap then costs two additions."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kernels = kernels or CallTimer()
        self._spans: deque[Span] | None = deque(maxlen=max_spans) if max_spans else None
        self._mark, self._kernel_mark = time.perf_counter(), (0.0, 0)

    def begin(self) -> None:
        """What was since the last lap belongs to none: the rank had nothing to do."""
        self._mark = time.perf_counter()

    def lap(self, name: str, tokens: int = 0) -> None:
        start, self._mark = self._mark, time.perf_counter()
        self.seconds[name] += self._mark - start
        if self._spans is not None:
            (seconds, calls), timer = self._kernel_mark, self._kernels
            self._spans.append(Span(name, start, self._mark, tokens, timer.seconds - seconds, timer.calls - calls))
            self._kernel_mark = timer.seconds, timer.calls

    def add(self, name: str, start: float, end: float) -> None:
        """A span inside a lap."""
        if self._spans is not None:
            self._spans.append(Span(name, start, end))

    def to_bytes(self) -> bytes:
        """Rows of all spans in the order they ended."""
        rows = [[s.name, s.start, s.end, s.tokens, s.kernel_s, s.kernel_calls] for s in self._spans or ()]
        return json.dumps(rows, separators=(",", ":")).encode()


def spans_from_bytes(data: bytes) -> list[Span]:
    return [Span(*row) for row in json.loads(data)]


def chrome_trace(worlds: dict[str, dict[str, list[Span]]]) -> dict[str, Any]:
    """Chrome's trace format: world -> rank -> spans, a process per rank. Every world begins at 0."""
    events: list[dict[str, Any]] = []
    for index, (world, ranks) in enumerate(worlds.items()):
        begin = min((span.start for spans in ranks.values() for span in spans), default=0.0)
        for rank, (name, spans) in enumerate(ranks.items()):
            process = index * PROCESSES_PER_WORLD + rank
            events.append(_about(process, "process_name", {"name": f"{world} {name}".strip()}))
            events.append(_about(process, "process_sort_index", {"sort_index": process}))
            events += [_event(span, process, begin) for span in spans]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def spans_of(trace: dict[str, Any]) -> dict[str, list[Span]]:
    """What `chrome_trace` made, process by process."""
    names: dict[int, str] = {}
    spans: dict[str, list[Span]] = {}
    for event in trace["traceEvents"]:
        if event["name"] == "process_name":
            names[event["pid"]] = event["args"]["name"]
            spans[event["args"]["name"]] = []
        elif event["ph"] == "X":
            start, details = event["ts"] / 1e6, event["args"]
            spans[names[event["pid"]]].append(
                Span(
                    name=event["name"],
                    start=start,
                    end=start + event["dur"] / 1e6,
                    tokens=details.get("tokens", 0),
                    kernel_s=details.get("kernel_us", 0) / 1e6,
                    kernel_calls=details.get("kernel_calls", 0),
                )
            )
    return spans


def _about(process: int, name: str, values: dict[str, object]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": process, "tid": 0, "args": values}


def _event(span: Span, process: int, begin: float) -> dict[str, Any]:
    details = {"tokens": span.tokens, "kernel_us": round(span.kernel_s * 1e6, 3), "kernel_calls": span.kernel_calls}
    return {
        "name": span.name,
        "ph": "X",
        "pid": process,
        "tid": 0,
        "ts": round((span.start - begin) * 1e6, 3),
        "dur": round((span.end - span.start) * 1e6, 3),
        "args": details if span.tokens else {},
    }
