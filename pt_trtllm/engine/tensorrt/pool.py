"""Builds the engines of all ranks, each in a process of its own, as many at a time as memory and cores allow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, Any

from pt_trtllm.engine.memory import available_bytes
from pt_trtllm.errors import EngineError

TICKS = 1000
"""Of progress, per rank."""
BUILDER_BYTES = 600 << 20
"""What a build takes beside the weights; the weights themselves are there twice for a moment."""
LOG_CHARS = 800


def build_bytes(weight_bytes: int) -> int:
    """Memory that the build of a rank needs at its peak."""
    return 2 * weight_bytes + BUILDER_BYTES


def num_workers(wanted: int, num_ranks: int, weight_bytes: int) -> int:
    """Builds to run at a time; 0 wants as many as fit."""
    fitting = max(1, available_bytes() // build_bytes(weight_bytes))
    return min(num_ranks, wanted or min(fitting, len(os.sched_getaffinity(0))))


class Pool:
    """Runs one worker process per job. When one fails, or the wait is interrupted, all others are ended."""

    def __init__(self, progress: Callable[[int, int], None], num_jobs: int) -> None:
        self._progress, self._shares = progress, [0.0] * num_jobs
        self._processes: list[subprocess.Popen[str]] = []
        self._lock, self._is_over = threading.Lock(), False

    def run(self, jobs: Sequence[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
        """The answers, in the order of the jobs."""
        with ThreadPoolExecutor(workers) as threads:
            futures = [threads.submit(self._run, index, job) for index, job in enumerate(jobs)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._end(futures)
                raise
        return [future.result() for future in futures]

    def _end(self, futures: Sequence[Any]) -> None:
        with self._lock:
            self._is_over = True
            for future in futures:
                future.cancel()
            for process in self._processes:
                process.kill()

    def _run(self, index: int, job: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryFile("w+") as log:
            process = self._start(log)
            assert process.stdin is not None
            assert process.stdout is not None
            with process:
                json.dump(job, process.stdin)
                process.stdin.close()
                answer: dict[str, Any] = {}
                for line in process.stdout:
                    answer = json.loads(line)
                    if "progress" in answer:
                        self._report(index, answer["progress"])
            if "done" in answer and process.returncode == 0:
                self._report(index, 1.0)
                return dict(answer["done"])
            if "error" in answer:
                raise EngineError(answer["error"])
            log.seek(0)
            raise EngineError(describe_end(job, process.returncode, log.read()))

    def _start(self, log: IO[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pt_trtllm.engine.tensorrt.worker"]
        with self._lock:
            if self._is_over:
                raise EngineError("not started: another rank failed")
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            self._processes.append(process)
            return process

    def _report(self, index: int, share: float) -> None:
        with self._lock:
            self._shares[index] = share
            self._progress(int(sum(self._shares) * TICKS), len(self._shares) * TICKS)


def describe_end(job: dict[str, Any], code: int, log: str) -> str:
    """Why a worker that gave no answer ended."""
    rank, needed = job["rank"], build_bytes(job["weight_bytes"])
    if code == -signal.SIGKILL or "bad_alloc" in log or "OutOfMemory" in log:
        return (
            f"rank {rank}: its build was ended for lack of memory: it needs about {needed / 2**30:.1f} GiB, "
            f"{available_bytes() / 2**30:.1f} GiB are free; use --workers 1, a machine with more memory, or more ranks"
        )
    tail = " ".join(log[-LOG_CHARS:].split()) or "it said nothing"
    return f"rank {rank}: its build process ended with {code}: {tail}"
