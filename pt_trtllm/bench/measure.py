"""One running engine under measurement: phases of requests, each with its times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pt_trtllm.bench.numbers import Spread, percentile
from pt_trtllm.bench.workload import Deadline, Workload

Engine = TypeVar("Engine", bound="Subject")
Request = tuple[list[int], int]
"""Token ids of the prompt, and how many to generate."""


@dataclass(frozen=True)
class Timeline:
    """When a request was sent, and when each of its tokens arrived, in seconds of one clock."""

    sent: float
    arrivals: tuple[float, ...]

    @property
    def to_first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        return self.arrivals[-1] - self.sent


@dataclass
class Samples:
    """Of every repeat: each single value, and one for all (a mean, a median or a rate)."""

    single: list[Sequence[float]] = field(default_factory=list)
    per_repeat: list[float] = field(default_factory=list)

    def add(self, single: Sequence[float], of_repeat: float) -> None:
        self.single.append(single)
        self.per_repeat.append(of_repeat)

    def spread(self, repeats: int, scale: float) -> Spread:
        """Of the first so many repeats."""
        single = [value for values in self.single[:repeats] for value in values]
        return Spread.of(self.per_repeat[:repeats], single, scale)


class Subject(ABC):
    """An engine, started; `repeat` measures everything once. Close it, or use it in a `with` block."""

    def __init__(self, name: str, workload: Workload, deadline: Deadline) -> None:
        self.name, self.workload, self.deadline = name, workload, deadline
        self.samples: dict[str, Samples] = {}
        self.load_s = 0.0

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def _ask(self, requests: Sequence[Request]) -> list[Timeline]:
        """Sends all at once, and waits for all answers or the deadline."""

    @abstractmethod
    def close(self) -> None: ...

    def warm_up(self) -> None:
        """Everything once in small: pages are mapped, threads and buffers exist. Not recorded."""
        load = self.workload
        for length in load.warm_up_lengths:
            self._ask([(self._prompt(length, "warm"), 1)])
        for batch in load.batch_sizes:
            self._ask([(self._prompt(load.decode_prompt_len, "warm", i), 2) for i in range(batch)])

    def repeat(self, index: int) -> None:
        """Measures every phase once; raises TimeUp between or within phases."""
        load = self.workload
        for length in load.prompt_lengths:
            prompts = [self._prompt(length, index, i) for i in range(load.first_tokens)]
            firsts = [
                timeline.to_first_token for prompt in prompts for timeline in self._phase("prefill", [(prompt, 1)])
            ]
            self._record(f"ttft/{length}", firsts, percentile(firsts, 50))
        for batch in load.batch_sizes:
            prompts = [self._prompt(load.decode_prompt_len, index, i) for i in range(batch)]
            gaps = token_gaps(self._phase(f"decode/{batch}", [(prompt, load.output_len) for prompt in prompts]))
            self._record(f"tpot/{batch}", gaps, sum(gaps) / len(gaps))
        if not load.num_requests:
            return
        requests = [(self._prompt(length, index, "mix", i), answer) for i, (length, answer) in enumerate(load.mix())]
        timelines = self._phase("mix", requests)
        seconds = max(t.arrivals[-1] for t in timelines) - min(t.sent for t in timelines)
        num_tokens = sum(len(t.arrivals) for t in timelines)
        self._record("tokens_per_s", [], num_tokens / seconds)
        self._record("requests_per_s", [], len(timelines) / seconds)
        for key, values in (
            ("mix_ttft", [t.to_first_token for t in timelines]),
            ("mix_latency", [t.latency for t in timelines]),
        ):
            self._record(key, values, percentile(values, 50))

    def rest(self) -> None:  # noqa: B027  # our own engines sleep as soon as they have answered
        """Waits until the engine sleeps: another one's turn begins."""

    def decode(self) -> None:
        """Every batch size once, not recorded."""
        load = self.workload
        for batch in load.batch_sizes:
            prompts = [self._prompt(load.decode_prompt_len, 0, i) for i in range(batch)]
            self._ask([(prompt, load.output_len) for prompt in prompts])

    def __enter__(self: Engine) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prompt(self, length: int, *key: object) -> list[int]:
        return self.workload.prompt(length, self.vocab_size, *key)

    def _record(self, key: str, single: Sequence[float], of_repeat: float) -> None:
        self.samples.setdefault(key, Samples()).add(single, of_repeat)

    def _phase(self, key: str, requests: Sequence[Request]) -> list[Timeline]:
        return self._ask(requests)


def token_gaps(timelines: Sequence[Timeline]) -> list[float]:
    """Times between successive tokens while all sequences decode together: no prompt is computed in between."""
    first, last = max(t.arrivals[0] for t in timelines), min(t.arrivals[-1] for t in timelines)
    everything = [
        (start, end - start, first <= start and end <= last)
        for timeline in timelines
        for start, end in zip(timeline.arrivals, timeline.arrivals[1:])  # noqa: B905  # one shorter on purpose
    ]
    together = [gap for _, gap, inside in everything if inside]
    return together or [gap for _, gap, _ in everything]
