"""One rank of a world: `python -m pt_trtllm.runtime.worker ENGINE_DIR JOB_DIR`, started by the launcher.

Only rank 0 reads the job; the others need the engine (at the same path on every host) and a folder for their log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

import torch

from pt_trtllm import env
from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.bundle import EngineConfig, open_bundle
from pt_trtllm.engine.registry import backend_module
from pt_trtllm.mapping import Mapping
from pt_trtllm.runtime.generate import Engine, Progress, follow, generate
from pt_trtllm.runtime.job import Job
from pt_trtllm.runtime.launch import log_name, status_name


def open_engine(engine_dir: Path, config: EngineConfig, comm: Communicator) -> Engine:
    """Opens this rank's engine with its share of the host's cores."""
    engine: Engine = backend_module(config.backend).open_engine(engine_dir, config, comm)
    return engine


def connect(mapping: Mapping) -> Communicator:
    if mapping.world_size == 1:
        return LocalCommunicator()
    from pt_trtllm.comm.mpi import MpiCommunicator

    return MpiCommunicator(mapping, timeout_s=env.COMM_TIMEOUT_S.get(), load_timeout_s=env.LOAD_TIMEOUT_S.get())


def share_cores(local_rank: int, local_size: int) -> None:
    """Binds a rank to its own cores where there are enough, and sizes its thread pool."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_size
    if share:
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
    torch.set_num_threads(env.NUM_THREADS.get() or max(1, share))


def main() -> None:
    engine_dir, job_dir = Path(sys.argv[1]), Path(sys.argv[2])
    job_dir.mkdir(exist_ok=True)
    rank = _launched_as("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    to_launcher = _redirect_output(job_dir / log_name(rank))
    _write_status(job_dir, rank, state="running", pid=os.getpid())
    comm: Communicator | None = None
    try:
        share_cores(
            _launched_as("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
            max(1, _launched_as("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE", default=1)),
        )
        config, _ = open_bundle(engine_dir)
        comm = connect(config.mapping)
        work(engine_dir, config, comm, job_dir, lambda done, total: _report(to_launcher, done, total))
        comm.close()
    except BaseException as error:
        traceback.print_exc()
        _write_status(job_dir, rank, state="failed", pid=os.getpid(), kind=type(error).__name__, message=str(error))
        if comm is not None:
            comm.abort(f"rank {rank} failed: {type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(1)  # MPI_Finalize would wait for ranks that will not come; the launcher ends them
    _write_status(job_dir, rank, state="done", pid=os.getpid())


def work(
    engine_dir: Path,
    config: EngineConfig,
    comm: Communicator,
    job_dir: Path,
    progress: Progress = lambda done, total: None,
) -> None:
    """One rank's part in a job, from its engine file to the results."""
    start = time.perf_counter()
    engine = open_engine(engine_dir, config, comm)
    print(f"rank {comm.rank}: loaded {engine_dir} in {time.perf_counter() - start:.2f} s", flush=True)
    comm.barrier()  # loading takes each rank its own time
    if comm.rank == 0:
        Job.write_results(job_dir, *generate(engine, Job.read(job_dir).requests, progress))
    else:
        follow(engine)
    comm.barrier()  # nobody tears down what another still reads


def _launched_as(*names: str, default: int = 0) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _redirect_output(path: Path) -> TextIO:
    """Sends stdout and stderr, of C libraries too, to the rank's log; returns the way to the launcher."""
    to_launcher = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return to_launcher


def _report(to_launcher: TextIO, done: int, total: int) -> None:
    print(json.dumps({"done": done, "total": total}), file=to_launcher)


def _write_status(job_dir: Path, rank: int, **status: object) -> None:
    temporary = job_dir / f".{status_name(rank)}"
    temporary.write_text(json.dumps({"time": time.time(), **status}))
    temporary.replace(job_dir / status_name(rank))


if __name__ == "__main__":
    main()
