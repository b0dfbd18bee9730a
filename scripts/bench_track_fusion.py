"""Latency of the track-fusion library beside MPI_Allreduce, in the same processes of one run.

python scripts/bench_track_fusion.py [--ranks 2 4] [--bytes 4096 ...] [--rounds N] [--json FILE]

Every single call is timed, in rounds that alternate between the contestants, so that other work on the machine meets
them all. Reported are the median and the 10th and 90th percentile over all calls of all rounds, on the rank whose
median is larger. Calls go through Python, as in an engine: `fuse` is the one that an engine makes in every step;
"all_reduce, C" is the C function alone, called through ctypes.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.bench.machine import hardware, versions
from pt_trtllm.bench.numbers import percentile
from pt_trtllm.comm.track_fusion import ShmGroup
from pt_trtllm.runtime.launch import launch_command

SIZES = (64, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304)
PERCENTS = (10, 50, 90)
WARM_UP = 20
CONTESTANTS = ("fuse", "all_reduce", "all_reduce, C", "MPI_Allreduce")
FLOAT32 = 0


def calls_per_round(num_bytes: int) -> int:
    return max(20, min(1000, (16 << 20) // num_bytes))


def time_calls(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds of every call."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def contestants(
    group: ShmGroup, x: torch.Tensor, out: torch.Tensor, mpi: Callable[[], object]
) -> dict[str, Callable[[], object]]:
    """The library called as an engine does, into memory that is there already, and without this project's Python."""
    library, pointer = group._library, group._pointer
    arguments = (pointer, x.data_ptr(), out.data_ptr(), x.numel(), FLOAT32, -1.0)
    calls = (
        lambda: group.fuse(x, op="sum"),
        lambda: group.all_reduce(x, out=out),
        lambda: library.pt_track_fusion_all_reduce(*arguments),
        mpi,
    )
    return dict(zip(CONTESTANTS, calls, strict=True))


def worker(output: Path, sizes: list[int], rounds: int) -> None:
    """One MPI rank, bound to its share of the cores: float32 sums of all contestants, compared."""
    import numpy as np
    from mpi4py import MPI

    from pt_trtllm.runtime.worker import share_cores

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    share_cores(rank, size)
    group = ShmGroup.create(size=size) if rank == 0 else None
    name = comm.bcast(group.name if group else None)
    group = group or ShmGroup.attach(name, rank=rank, size=size)
    rows = []
    with group:
        for num_bytes in sizes:
            x = torch.full((1, num_bytes // 4), float(rank + 1))
            source = x.numpy()
            ours, theirs = torch.empty_like(x), np.empty_like(source)
            calls = contestants(group, x, ours, functools.partial(comm.Allreduce, source, theirs))
            samples: dict[str, list[float]] = {label: [] for label in calls}
            for _ in range(rounds):
                for label, call in calls.items():
                    comm.Barrier()
                    time_calls(call, WARM_UP)
                    samples[label] += time_calls(call, calls_per_round(num_bytes))
            fused = group.fuse(x, op="sum")[0]
            if not (np.array_equal(ours.numpy(), theirs) and np.array_equal(fused.numpy(), theirs)):
                raise SystemExit(f"rank {rank}: the results differ at {num_bytes} bytes")
            mine = {label: [percentile(times, p) for p in PERCENTS] for label, times in samples.items()}
            every: list[dict[str, list[float]]] = comm.allgather(mine)
            slowest = {label: max((found[label] for found in every), key=lambda three: three[1]) for label in mine}
            rows.append({"bytes": num_bytes, "samples": len(samples["fuse"]), "us": slowest})
        if rank == 0:
            output.write_text(json.dumps({"ranks": size, "isa": group.isa, "rows": rows}))


def launch(ranks: int, output: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    command = [*launch_command(ranks), sys.executable, str(Path(__file__).resolve()), "--worker", str(output)]
    command += ["--bytes", *map(str, sizes), "--rounds", str(rounds)]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def table(run: dict[str, Any]) -> str:
    lines = [
        f"{run['ranks']} ranks, {run['isa']}; median (p10 - p90) in us",
        "",
        f"| bytes | {' | '.join(CONTESTANTS)} | MPI / fuse |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in run["rows"]:
        cells = [f"{mid:.1f} ({low:.1f} - {high:.1f})" for low, mid, high in (row["us"][c] for c in CONTESTANTS)]
        ratio = row["us"]["MPI_Allreduce"][1] / row["us"]["fuse"][1]
        lines.append(f"| {row['bytes']} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.bytes, options.rounds)
        return
    load_before, runs = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            runs.append(launch(ranks, Path(folder) / f"{ranks}.json", options.bytes, options.rounds))
    machine = hardware()
    print(f"{machine['processor']}, {machine['cores']} cores, load {load_before:.1f} before")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for run in runs:
        print(f"\n{table(run)}")
    if options.json:
        data = {"hardware": machine, "versions": versions(), "load_before": load_before, "runs": runs}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
