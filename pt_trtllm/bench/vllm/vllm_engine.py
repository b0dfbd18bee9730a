"""A vLLM engine under measurement: the processes of its environment, asked in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pt_trtllm.bench.measure import Request, Subject, Timeline
from pt_trtllm.bench.vllm.environment import WORKER, VllmEnvironment
from pt_trtllm.bench.vllm.operations import Collectives, collectives
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import CommunicationError
from pt_trtllm.processes import processor_seconds
from pt_trtllm.testing.hosts import INTERFACE, Hosts

EXIT_S = 30.0
"""vLLM gives its own ranks five seconds."""
COUNTED_PROMPT, COUNTED_PASSES = 16, 5
BLOCK_TOKENS = 128
"""Of vLLM's cache on CPUs."""
COUNTER = "pt_trtllm.bench.vllm.counter.OperationCounter"
READ_BYTES = 1 << 20
REST_S, IDLE_SHARE, LONGEST_REST_S = 0.3, 0.1, 10.0
"""Idle is who uses less than this share of a core for so long; a machine without a moment's rest is not waited for."""


class VllmEngine(Subject):
    """`start` loads it: one process that starts the ranks as vLLM does, or one for each rank on `hosts`."""

    def __init__(
        self, name: str, model_dir: Path, model: ModelConfig, world_size: int, workload: Workload, deadline: Deadline
    ) -> None:
        super().__init__(name, workload, deadline)
        self.model_dir, self.model, self.world_size = model_dir, model, world_size
        self.versions: dict[str, str] = {}
        self.collectives: Collectives
        self._processes: list[subprocess.Popen[bytes]] = []
        self._unread: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def start(self, environment: VllmEnvironment, folder: Path, eager: bool, hosts: Hosts | None = None) -> None:
        """`folder` is where the processes run and log. Raises with the last lines of a log when they do not load."""
        self._logs = [folder / f"{self.model_dir.name}-{rank}.log" for rank in range(hosts.num_hosts if hosts else 1)]
        command = [str(environment.python), "-m", WORKER]
        for rank, log in enumerate(self._logs):
            variables = environment.variables(_cores(self.world_size))
            variables["TMPDIR"] = str(folder)  # vLLM leaves its sockets there
            words = command
            if hosts is not None:
                words = hosts.command(rank, *command)
                variables |= {
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the host has given it cores already
                    "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.world_size)),
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "VLLM_HOST_IP": hosts.addresses[rank],
                }
            with log.open("wb") as file:
                self._processes.append(
                    subprocess.Popen(
                        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=folder, env=variables,
                        start_new_session=True,
                    )
                )  # fmt: skip
        begin = time.perf_counter()
        address = f"{hosts.addresses[0]}:{hosts.free_port()}" if hosts is not None else None
        answers = self._say({"arguments": self.arguments(eager), "address": address})
        self.load_s = time.perf_counter() - begin
        self.versions = dict(answers[0]["versions"])

    def arguments(self, eager: bool) -> dict[str, Any]:
        """vLLM's own, but for what makes repeats repeat: no tokenizer, no common beginnings."""
        load = self.workload
        return {
            "model": str(self.model_dir),
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "tensor_parallel_size": self.world_size,
            "max_model_len": load.longest_sequence,
            "max_num_seqs": max(*load.batch_sizes, load.num_requests),
            "max_num_batched_tokens": max(load.longest_prompt, 2048),
            "kv_cache_memory_bytes": self._cache_bytes(),
            "enable_prefix_caching": False,
            "enforce_eager": eager,
            "worker_extension_cls": COUNTER,
            "disable_log_stats": True,
            "seed": load.seed,
        }

    def count_collectives(self) -> None:
        """In the passes of one request of its own, which is not measured."""
        request = (self._prompt(COUNTED_PROMPT, "count"), COUNTED_PASSES)
        answers = self._say({"requests": [request], "count": True})
        ranks = [operations for answer in answers for operations in answer["operations"]]
        self.collectives = collectives(ranks, COUNTED_PASSES)

    def start_over(self, deadline: Deadline) -> None:
        """Forgets what was measured: the link is another one."""
        self.deadline, self.samples = deadline, {}

    def rest(self) -> None:
        """vLLM's ranks go on asking for work for a second, with a core each."""
        until = time.monotonic() + LONGEST_REST_S
        used, before = self._processor_seconds(), -math.inf
        while used - before > IDLE_SHARE * REST_S and time.monotonic() < until:
            self.deadline.check()
            time.sleep(REST_S)
            before, used = used, self._processor_seconds()

    def _processor_seconds(self) -> float:
        return sum(processor_seconds(process.pid) for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        until = time.monotonic() + EXIT_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started and left
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._processes = []

    def _ask(self, requests: Sequence[Request]) -> list[Timeline]:
        answer = self._say({"requests": requests})[0]
        return [Timeline(answer["sent"], tuple(arrivals)) for arrivals in answer["arrivals"]]

    def _say(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Tells every process, and waits for the answers of all; raises TimeUp at the deadline."""
        self.deadline.check()
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # `_line` tells that it ended
                process.stdin.write(json.dumps({**message, "rank": rank}).encode() + b"\n")
                process.stdin.flush()
        return [json.loads(self._line(rank)) for rank in range(len(self._processes))]

    def _line(self, rank: int) -> bytes:
        process = self._processes[rank]
        assert process.stdout is not None
        data = self._unread.pop(rank, b"")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in data:
                if not selector.select(self.deadline.left_s):
                    raise TimeUp
                piece = os.read(process.stdout.fileno(), READ_BYTES)
                if not piece:
                    raise CommunicationError(
                        f"{self.name}: vLLM ended early; its log says: {_reason(self._logs[rank])}"
                    )
                data += piece
        line, _, self._unread[rank] = data.partition(b"\n")
        return line

    def _cache_bytes(self) -> int:
        """Per rank: as many tokens as are ever in the cache at once, and a block to spare for each sequence."""
        config = self.model
        heads = max(1, config.num_kv_heads * config.num_tracks // self.world_size)
        per_token = 2 * heads * config.head_dim * config.num_hidden_layers * 2
        return (self.workload.most_cached_tokens + 2 * BLOCK_TOKENS) * per_token


def _cores(world_size: int) -> str:
    """vLLM's own rule leaves machines with few cores without any for a rank: here every rank has an equal share."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // world_size
    if not share:
        return "nobind"
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(world_size))


def _reason(log: Path) -> str:
    """The last line that names an error, or the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["nothing"])[-1]
