"""Runs many jobs in one MPI world: the ranks are the real ones, only their start-up is shared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.runtime.launch import launch_command


def run_jobs(world_size: int, jobs: Sequence[tuple[Path, Path]], timeout_s: float = 800.0) -> None:
    """(engine folder, job folder) each; a job folder holds `job.json`, results land beside it."""
    if not jobs:
        return
    command = [
        *launch_command(world_size),
        sys.executable,
        "-m",
        "pt_trtllm.testing.ranks",
        *(str(path) for job in jobs for path in job),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (
        f"{world_size} ranks ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    )


def main(paths: Sequence[str]) -> None:
    """One rank: the same steps as `runtime.worker`, once per job."""
    import torch

    from pt_trtllm.runtime.core import follow
    from pt_trtllm.runtime.generate import generate
    from pt_trtllm.runtime.opening import connect, open_engine
    from pt_trtllm.runtime.options import RuntimeOptions
    from pt_trtllm.testing.jobs import Job

    torch.set_num_threads(1)
    for engine_dir, job_dir in zip(map(Path, paths[::2]), map(Path, paths[1::2]), strict=True):
        config, _ = open_bundle(engine_dir)
        comm = connect(config.mapping)
        engine, options = open_engine(engine_dir, config, comm, RuntimeOptions())
        if comm.rank == 0:
            Job.write_results(job_dir, *generate(engine, Job.read(job_dir).requests, options))
        else:
            follow([engine])
        comm.barrier()
        comm.close()


if __name__ == "__main__":
    main(sys.argv[1:])
