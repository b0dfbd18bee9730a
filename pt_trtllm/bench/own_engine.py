"""An engine of our own under measurement: what its ranks counted belongs to the measured phases."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt_trtllm.bench.measure import Request, Subject, Timeline
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.runtime.launch import status_name
from pt_trtllm.runtime.llm import LLM, make_request
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.stream import AsyncStream


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


class OwnEngine(Subject):
    """`start` launches its ranks."""

    def __init__(self, name: str, engine_dir: Path, workload: Workload, deadline: Deadline) -> None:
        super().__init__(name, workload, deadline)
        self.engine_dir = engine_dir
        self.phases: dict[str, PhaseTime] = {}
        self._llm: LLM | None = None

    def start(self, cache_tokens: int, trace_file: Path | None = None, hostfile: Path | None = None) -> None:
        """Launches the ranks; common beginnings are computed every time, so that repeats repeat."""
        options = RuntimeOptions(
            max_tokens_in_paged_kv_cache=cache_tokens, enable_block_reuse=False, trace_file=str(trace_file or "")
        )
        begin = time.perf_counter()
        with self.deadline.enforced():
            self._llm = LLM(self.engine_dir, options=options, hostfile=hostfile)
        self.load_s = time.perf_counter() - begin
        self._llm.tokenizer = None  # token ids are all that is asked for and counted
        self.config = self._llm.config

    @property
    def vocab_size(self) -> int:
        return self.config.checkpoint.model.vocab_size

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

    def _phase(self, key: str, requests: Sequence[Request]) -> list[Timeline]:
        assert self._llm is not None
        before = self._llm.stats()
        timelines = self._ask(requests)
        after = self._llm.stats()
        phase = self.phases.setdefault(key, PhaseTime())
        for name in vars(phase):
            setattr(phase, name, getattr(phase, name) + after[name] - before[name])
        return timelines

    def _ask(self, requests: Sequence[Request]) -> list[Timeline]:
        """Sends (prompt, tokens to generate) in one message, and waits for all answers or the deadline.

        Sent one by one, they would join the batch at different steps each time.
        """
        assert self._llm is not None
        llm = self._llm
        asked = [
            make_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True), None, "prompt")
            for prompt, count in requests
        ]
        self.deadline.check()

        async def everyone() -> list[Timeline]:
            streams = [AsyncStream(None, request, None) for request in asked]
            sent = time.perf_counter()
            llm._submit(streams)
            tasks = [asyncio.ensure_future(_arrivals(stream, sent)) for stream in streams]
            try:
                done, late = await asyncio.wait(
                    tasks, timeout=self.deadline.left_s, return_when=asyncio.FIRST_EXCEPTION
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


def peak_rss_bytes(status_file: Path) -> int:
    """VmHWM of the process that a rank's status file names; 0 where there is no such process (on another host)."""
    try:
        pid = json.loads(status_file.read_text())["pid"]
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ValueError, KeyError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
