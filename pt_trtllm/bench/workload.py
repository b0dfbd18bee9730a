"""What is asked of every engine, the same for all: prompts, batches, a mix of requests; and how long it may take."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pt_trtllm.config import problems_to_error
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.errors import ConfigError

PROMPT_LENGTHS = (32, 128, 512)
BLOCK_MULTIPLE = 128
"""Cache space per sequence is rounded up to this many tokens, a multiple of every cache's block."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    """Prompts whose time to the first token is measured."""
    batch_size: int = 8
    """N of "batch N": the most sequences that decode together."""
    smaller_batch_sizes: tuple[int, ...] = (1,)
    """Measured as well."""
    decode_prompt_len: int = 32
    output_len: int = 32
    """Tokens of every decoding request."""
    num_requests: int = 16
    """Requests of the mix: all arrive at once, prompts and answers of different lengths. 0 leaves the mix out."""
    first_tokens: int = 3
    """Requests per prompt length and repeat; each repeat counts with its median."""
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "decode_prompt_len": 1, "output_len": 2, "first_tokens": 1, "repeats": 1}
        least |= {"num_requests": 0, "seed": 0}
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if not all(0 < size <= self.batch_size for size in self.smaller_batch_sizes):
            problems.append(
                f"smaller_batch_sizes are {list(self.smaller_batch_sizes)}, expected 1 to {self.batch_size}"
            )
        if not self.prompt_lengths or min(self.prompt_lengths) < 1:
            problems.append(f"prompt_lengths are {list(self.prompt_lengths)}, expected positive lengths")
        problems_to_error("workload", problems)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({*self.smaller_batch_sizes, self.batch_size}))

    @property
    def warm_up_lengths(self) -> tuple[int, ...]:
        """A workload that asks once per repeat has no time for long prompts that do not count."""
        return self.prompt_lengths[:1] if self.first_tokens == 1 else self.prompt_lengths

    @property
    def longest_prompt(self) -> int:
        return max(*self.prompt_lengths, self.decode_prompt_len)

    @property
    def longest_sequence(self) -> int:
        """Of everything that is asked: prompts of the mix are no longer than those measured alone."""
        return self.longest_prompt + self.output_len

    @property
    def most_cached_tokens(self) -> int:
        """Of all phases: every sequence takes whole blocks."""

        def cached(prompt: int, answer: int) -> int:
            return -(-(prompt + answer) // BLOCK_MULTIPLE) * BLOCK_MULTIPLE

        decoding = self.batch_size * cached(self.decode_prompt_len, self.output_len)
        return max(cached(self.longest_prompt, 1), decoding, sum(cached(*request) for request in self.mix()))

    @property
    def mean_context(self) -> float:
        """Tokens in the cache of a decoding sequence, on average over its measured tokens."""
        return self.decode_prompt_len + self.output_len / 2

    def build_limits(self) -> BuildLimits:
        """An engine that is just large enough."""
        limits = BuildLimits()
        return dataclasses.replace(
            limits,
            max_batch_size=self.batch_size,
            max_seq_len=self.longest_sequence,
            max_num_tokens=max(limits.max_num_tokens, self.batch_size),
        )

    def cache_tokens(self, limits: BuildLimits) -> int:
        """Size of the KV cache with which no sequence of an engine ever waits for space."""
        per_sequence = -(-self.longest_sequence // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
        return per_sequence * limits.max_batch_size

    def check(self, limits: Sequence[BuildLimits]) -> None:
        """Raises when one of the engines cannot be asked all of it."""
        problems = []
        for name, needed, allowed in (
            ("batch_size", self.batch_size, min(limit.max_batch_size for limit in limits)),
            ("prompts of up to", self.longest_prompt, min(limit.max_input_len for limit in limits)),
            ("sequences of up to", self.longest_sequence, min(limit.max_seq_len for limit in limits)),
        ):
            if needed > allowed:
                problems.append(f"{name} {needed}, but the engines allow {allowed}")
        if problems:
            raise ConfigError(f"workload: {'; '.join(problems)}; ask for less, or build larger engines")

    def prompt(self, length: int, vocab_size: int, *key: object) -> list[int]:
        """Random tokens, the same for the same key, so that every engine sees the same prompts."""
        rng = random.Random(repr((self.seed, length, *key)))
        return [rng.randrange(vocab_size) for _ in range(length)]

    def mix(self) -> list[tuple[int, int]]:
        """(prompt length, answer length) of every request of the mix."""
        rng = random.Random(self.seed)
        return [
            (rng.choice(self.prompt_lengths), rng.randint(max(1, self.output_len // 4), self.output_len))
            for _ in range(self.num_requests)
        ]


SHORT = Workload(
    prompt_lengths=(128, 512), decode_prompt_len=16, output_len=16, num_requests=0, repeats=3, first_tokens=1
)
"""For models whose every token takes a tenth of a second."""


def fitting(
    limits: Sequence[BuildLimits],
    prompt_lengths: tuple[int, ...] | None,
    defaults: Workload | None = None,
    *,
    batch_sizes: Sequence[int] = (),
    **given: Any,
) -> Workload:
    """The workload that was asked for; what was left open (None) is made to fit the smallest of the engines."""
    defaults = defaults or Workload()
    chosen = {name: value for name, value in given.items() if value is not None}
    if batch_sizes:
        chosen["batch_size"] = max(batch_sizes)
        chosen["smaller_batch_sizes"] = tuple(sorted({1, *batch_sizes} - {max(batch_sizes)}))
    if limits:
        seq_len, input_len = min(x.max_seq_len for x in limits), min(x.max_input_len for x in limits)
        chosen.setdefault("output_len", max(2, min(defaults.output_len, seq_len // 2)))
        chosen.setdefault("batch_size", min(defaults.batch_size, *(x.max_batch_size for x in limits)))
        room = min(input_len, seq_len - chosen["output_len"])
        prompt_lengths = prompt_lengths or tuple(x for x in PROMPT_LENGTHS if x <= room) or (max(1, room),)
        chosen.setdefault("decode_prompt_len", max(1, min(defaults.decode_prompt_len, room)))
    lengths = tuple(sorted(set(prompt_lengths or defaults.prompt_lengths)))
    workload = dataclasses.replace(defaults, prompt_lengths=lengths, **chosen)
    if limits:
        workload.check(limits)
    return workload


class TimeUp(Exception):
    """The run's time is over; what was measured until now is reported."""


class Deadline:
    """A point in time after which nothing new is begun and nothing is waited for."""

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ConfigError(f"max_seconds is {seconds}, expected above 0")
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        if not self.left_s:
            raise TimeUp

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Interrupts what blocks inside with TimeUp. Only a main thread can be interrupted: elsewhere it waits."""
        self.check()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(signum: int, frame: object) -> None:
            raise TimeUp

        begin, previous = time.monotonic(), signal.signal(signal.SIGALRM, ring)
        left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, max(self.left_s, 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, previous)
            if left_s:  # somebody else's alarm, which may be due by now
                signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.monotonic() - begin), 1e-3), interval_s)
