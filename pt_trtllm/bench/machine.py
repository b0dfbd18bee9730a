"""The machine beneath the engines: what it is, and how fast it reads memory from as many processes as there are ranks.

`python -m pt_trtllm.bench.machine LOCAL_RANK LOCAL_SIZE BYTES` is one of those processes: bound to cores as a rank is,
it reads its memory for a moment for every line on stdin, and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pt_trtllm import __version__
from pt_trtllm.errors import CommunicationError
from pt_trtllm.runtime.launch import find_mpirun
from pt_trtllm.runtime.worker import share_cores

READ_BYTES = 256 << 20
"""Per process: several times what a last-level cache gives one core."""
READ_S = 0.2
EXIT_S = 5.0


def hardware() -> dict[str, Any]:
    features = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instruction_sets": [name for name in names if features.get(name)],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    return {
        "pt-trtllm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mpi": _mpi_version(),
    }


class ReadBandwidth:
    """As many processes as ranks, asleep between measurements. Close it, or use it in a `with` block."""

    def __init__(self, world_size: int, num_bytes: int = READ_BYTES) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for rank in range(world_size):
                command = [sys.executable, "-m", __name__, str(rank), str(world_size), str(num_bytes)]
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                    )
                )
            for process in self._processes:
                _line(process)  # its memory is filled
        except BaseException:
            self.close()
            raise

    def measure(self) -> float:
        """Bytes per second that all processes together read."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # `_line` tells that it ended
                process.stdin.write("\n")
                process.stdin.flush()
        return sum(float(_line(process)) for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._processes = []

    def __enter__(self) -> ReadBandwidth:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise CommunicationError(f"the process that measures memory bandwidth (pid {process.pid}) ended early")
    return line


def read_memory(local_rank: int, local_size: int, num_bytes: int) -> None:
    """One process: reports bytes per second on stdout for every line on stdin."""
    share_cores(local_rank, local_size)
    memory = torch.ones(max(1, num_bytes // 4))
    memory.sum()
    print("ready", flush=True)
    for _ in sys.stdin:
        start, passes = time.perf_counter(), 0
        while not passes or time.perf_counter() - start < READ_S:
            memory.sum()
            passes += 1
        print(passes * memory.nbytes / (time.perf_counter() - start), flush=True)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _mpi_version() -> str:
    path = find_mpirun()
    if path is None:
        return "none"
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(done.stdout.splitlines()), "unknown").strip()


if __name__ == "__main__":
    read_memory(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
