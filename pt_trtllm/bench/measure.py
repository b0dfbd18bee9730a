"""One running engine under measurement: phases of requests, each with its times and what the engine counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt_trtllm.bench.numbers import Spread, percentile
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.runtime.launch import status_name
from pt_trtllm.runtime.llm import LLM, make_request
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.stream import AsyncStream


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


@dataclass
class PhaseTime:
    """What the engine counted during all repeats of one phase, on rank 0."""

    forward_passes: int = 0
    seconds: float = 0.0
    seconds_in_forward: float = 0.0
    seconds_in_broadcast: float = 0.0
    seconds_in_service: float = 0.0
    seconds_in_collectives: float = 0.0

    @property
    def own_work_us(self) -> float:
        """Rank 0's own work per pass: while it schedules, samples and reports, the others wait."""
        outside = self.seconds - self.seconds_in_forward - self.seconds_in_broadcast + self.seconds_in_service
        return outside / max(1, self.forward_passes) * 1e6


class Subject:
    """An engine, started; `repeat` measures everything once. Close it, or use it in a `with` block."""

    def __init__(self, name: str, engine_dir: Path, workload: Workload, deadline: Deadline) -> None:
        self.name, self.engine_dir = name, engine_dir
        self.workload, self._deadline = workload, deadline
        self.samples: dict[str, Samples] = {}
        self.phases: dict[str, PhaseTime] = {}
        self._llm: LLM | None = None

    def start(self, cache_tokens: int, trace_file: Path | None = None, hostfile: Path | None = None) -> None:
        """Launches the ranks; common beginnings are computed every time, so that repeats repeat."""
        options = RuntimeOptions(
            max_tokens_in_paged_kv_cache=cache_tokens, enable_block_reuse=False, trace_file=str(trace_file or "")
        )
        begin = time.perf_counter()
        with self._deadline.enforced():
            self._llm = LLM(self.engine_dir, options=options, hostfile=hostfile)
        self.load_s = time.perf_counter() - begin
        self._llm.tokenizer = None  # token ids are all that is asked for and counted
        self.config = self._llm.config

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

    def decode(self) -> None:
        """Every batch size once, not recorded."""
        load = self.workload
        for batch in load.batch_sizes:
            prompts = [self._prompt(load.decode_prompt_len, 0, i) for i in range(batch)]
            self._ask([(prompt, load.output_len) for prompt in prompts])

    def stats(self) -> dict[str, Any]:
        """What the engine itself counted since it started."""
        assert self._llm is not None
        return self._llm.stats()

    def peak_rss_bytes(self) -> list[int]:
        """Largest resident set of every rank on this host so far, mapped weights included."""
        assert self._llm is not None
        folder = self._llm._world.folder
        return [peak_rss_bytes(folder / status_name(rank)) for rank in range(self.config.mapping.world_size)]

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prompt(self, length: int, *key: object) -> list[int]:
        return self.workload.prompt(length, self.config.checkpoint.model.vocab_size, *key)

    def _record(self, key: str, single: Sequence[float], of_repeat: float) -> None:
        self.samples.setdefault(key, Samples()).add(single, of_repeat)

    def _phase(self, key: str, requests: Sequence[tuple[list[int], int]]) -> list[Timeline]:
        assert self._llm is not None
        before = self._llm.stats()
        timelines = self._ask(requests)
        after = self._llm.stats()
        phase = self.phases.setdefault(key, PhaseTime())
        for name in vars(phase):
            setattr(phase, name, getattr(phase, name) + after[name] - before[name])
        return timelines

    def _ask(self, requests: Sequence[tuple[list[int], int]]) -> list[Timeline]:
        """Sends (prompt, tokens to generate) in one message, and waits for all answers or the deadline.

        Sent one by one, they would join the batch at different steps each time.
        """
        assert self._llm is not None
        llm = self._llm
        asked = [
            make_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True), None, "prompt")
            for prompt, count in requests
        ]
        self._deadline.check()

        async def everyone() -> list[Timeline]:
            streams = [AsyncStream(None, request, None) for request in asked]
            sent = time.perf_counter()
            llm._submit(streams)
            tasks = [asyncio.ensure_future(_arrivals(stream, sent)) for stream in streams]
            try:
                done, late = await asyncio.wait(
                    tasks, timeout=self._deadline.left_s, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()  # raises what failed
                if late:
                    raise TimeUp
                return [task.result() for task in tasks]
            finally:  # requests that are still running are cancelled
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for stream in streams:
                    stream.cancel(llm._world)

        return asyncio.run(everyone())


async def _arrivals(stream: AsyncStream, sent: float) -> Timeline:
    arrivals: list[float] = []
    while not stream.finished:
        stream.take(await stream.inbox.get())
        new = len(stream.samples[0].output().token_ids) - len(arrivals)
        arrivals += [time.perf_counter()] * new
    return Timeline(sent, tuple(arrivals))


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


def peak_rss_bytes(status_file: Path) -> int:
    """VmHWM of the process that a rank's status file names; 0 where there is no such process (on another host)."""
    try:
        pid = json.loads(status_file.read_text())["pid"]
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ValueError, KeyError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
