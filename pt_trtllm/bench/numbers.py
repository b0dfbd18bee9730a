"""Medians, percentiles and ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of repeated measurements. `median` is over the repeats, each one value; percentiles are over every sample."""

    median: float
    p50: float
    p90: float
    p99: float
    num_samples: int
    num_repeats: int

    @classmethod
    def of(cls, per_repeat: Sequence[float], single: Sequence[float] = (), scale: float = 1.0) -> Spread:
        """Without single samples, the repeats are the samples."""
        every = [value * scale for value in single or per_repeat]
        return cls(
            median=percentile(per_repeat, 50) * scale,
            p50=percentile(every, 50),
            p90=percentile(every, 90),
            p99=percentile(every, 99),
            num_samples=len(every),
            num_repeats=len(per_repeat),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values, as numpy's default."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(value: float | None, first: float | None) -> float | None:
    """`value` in units of `first`; None where one is missing or the first is 0."""
    if value is None or not first:
        return None
    return value / first
