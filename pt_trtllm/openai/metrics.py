"""Numbers of the front end itself, in Prometheus' text form: what clients saw, which no server behind it can know."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

PREFIX = "pt_openai_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histograms' buckets."""


@dataclass
class Histogram:
    name: str
    help: str
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[sum(seconds > bound for bound in SECONDS)] += 1
        self.total += seconds

    def lines(self) -> list[str]:
        name, below = PREFIX + self.name, 0
        lines = [f"# HELP {name} {self.help}", f"# TYPE {name} histogram"]
        for bound, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        """By HTTP status; 499 for clients that left."""
        self.in_flight = self.prompt_tokens = self.generation_tokens = 0
        self.first_token = Histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self.per_token = Histogram("time_per_output_token_seconds", "Between the tokens of an answer, on average.")
        self.duration = Histogram("request_duration_seconds", "From a request's arrival to its answer's end.")

    def text(self) -> str:
        lines = []
        for name, kind, meaning, value in (
            ("requests_in_flight", "gauge", "Requests being answered.", self.in_flight),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("generation_tokens_total", "counter", "Tokens of answers.", self.generation_tokens),
        ):
            lines += [f"# HELP {PREFIX}{name} {meaning}", f"# TYPE {PREFIX}{name} {kind}", f"{PREFIX}{name} {value}"]
        name = PREFIX + "requests_total"
        lines += [f"# HELP {name} Requests by HTTP status; 499: the client left.", f"# TYPE {name} counter"]
        lines += [f'{name}{{status="{status}"}} {count}' for status, count in sorted(self.requests.items())]
        for histogram in (self.first_token, self.per_token, self.duration):
            lines += histogram.lines()
        return "\n".join(lines) + "\n"


class Stopwatch:
    """Times one request for the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start = metrics, time.monotonic()
        self._first = self._last = 0.0
        self._tokens = 0

    def token(self, count: int) -> None:
        self._last = time.monotonic()
        if not self._tokens:
            self._first = self._last
            self._metrics.first_token.observe(self._first - self._start)
        self._tokens += count
        self._metrics.generation_tokens += count

    def finish(self, num_answers: int) -> None:
        self._metrics.duration.observe(time.monotonic() - self._start)
        following = self._tokens / num_answers - 1  # answers of one request grow side by side
        if following > 0:
            self._metrics.per_token.observe((self._last - self._first) / following)
