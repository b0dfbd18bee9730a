"""One rank of a world: `python -m pt_trtllm.runtime.worker ENGINE_DIR WORLD_DIR SOCKET OPTIONS [TOKENIZER_DIR]`.

Only rank 0 needs the socket and the tokenizer (it runs on the launcher's host; without a folder, the engine's own
tokenizer serves if it has one). The others need the engine, at the same path on every host, and a folder for their log.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from pt_trtllm import env, native
from pt_trtllm.checkpoint.artifact import replace_file
from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.library import LIBRARY_NAME
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.runtime.core import EngineCore, follow
from pt_trtllm.runtime.launch import log_name, status_name
from pt_trtllm.runtime.messages import STOP
from pt_trtllm.runtime.opening import connect, open_engine
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.protocol import Channel
from pt_trtllm.runtime.service import Service
from pt_trtllm.runtime.speculative.draft_model import DraftModel
from pt_trtllm.runtime.speculative.own_ranks import DraftService
from pt_trtllm.runtime.speculative.set_up import open_proposer, together
from pt_trtllm.runtime.tokenizer import find_tokenizer
from pt_trtllm.trace import MAX_SPANS, CallTimer, Tracer, chrome_trace, spans_from_bytes


def share_cores(local_rank: int, local_size: int) -> None:
    """Binds a rank to its own cores where there are enough, and sizes its thread pool."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_size
    if share and local_rank < local_size:
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
    torch.set_num_threads(min(env.NUM_THREADS.get(), len(cores)) or max(1, share))


def serve(
    engine_dir: Path, world_dir: Path, socket_path: str, options: RuntimeOptions, tokenizer_dir: Path | None
) -> None:
    """One rank's whole life. Rank 0 talks to the client, the others follow it."""
    config, _ = open_bundle(engine_dir)
    trace = Tracer()
    if options.trace_file:
        native.time_calls(kernels := CallTimer(), besides=LIBRARY_NAME)
        trace = Tracer(MAX_SPANS, kernels)
    comm = connect(config.mapping, options.fusion_coding)
    comm.stats.on_span = trace.add if options.trace_file else None
    try:
        engine, options = open_engine(engine_dir, config, comm, options)
        proposer, others = open_proposer(engine, options)
        if comm.rank == 0:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(socket_path)
                if options.guesses_ahead:
                    space = options.kv_space(config, shares_blocks=engine.shares_blocks)
                    model = DraftModel(config, space, together(engine, comm, 0))
                    DraftService(model, Channel(connection), options.guesses_ahead).run()
                    comm.broadcast(STOP)
                else:
                    core = EngineCore(engine, options, find_tokenizer(engine_dir, tokenizer_dir), proposer, trace)
                    Service(core, Channel(connection), world_dir).run()
                    core.stop()
        else:
            follow([engine, *others], trace)
        if options.trace_file:
            _write_trace(comm, trace, Path(options.trace_file))
        for opened in (engine, *others):
            opened.close()
        comm.barrier()  # nobody tears down what another still reads
    except BaseException as error:
        comm.abort(f"rank {comm.rank} failed: {type(error).__name__}: {error}")
        raise
    comm.close()


def _write_trace(comm: Communicator, trace: Tracer, target: Path) -> None:
    ranks = [spans_from_bytes(part) for part in comm.collect(trace.to_bytes())]
    if ranks:
        with replace_file(target) as path:
            path.write_text(json.dumps(chrome_trace({"": {f"rank {rank}": spans for rank, spans in enumerate(ranks)}})))


def main() -> None:
    engine_dir, world_dir = Path(sys.argv[1]), Path(sys.argv[2])
    socket_path, options, *tokenizer_dir = sys.argv[3:]
    os.umask(0o077)  # prompts and answers are nobody else's
    world_dir.mkdir(parents=True, exist_ok=True)
    if world_dir.stat().st_uid != os.getuid():
        raise SystemExit(f"{world_dir} belongs to another user")
    rank = _launched_as("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    _redirect_output(world_dir / log_name(rank))
    _write_status(world_dir, rank, state="running", pid=os.getpid())
    try:
        share_cores(
            _launched_as("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
            max(1, _launched_as("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", default=_slurm_local_size())),
        )
        serve(
            engine_dir,
            world_dir,
            socket_path,
            RuntimeOptions.from_bytes(options.encode()),
            Path(tokenizer_dir[0]) if tokenizer_dir else None,
        )
    except BaseException as error:
        # First what the launcher looks for: a rank that lost a peer is ended a moment later.
        _write_status(world_dir, rank, state="failed", pid=os.getpid(), kind=type(error).__name__, message=str(error))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # MPI_Finalize would wait for ranks that will not come; the launcher ends them
    _write_status(world_dir, rank, state="done", pid=os.getpid())
    _leave()


def _leave() -> None:
    """To take Python and torch apart would be a fifth of the time of a short world."""
    if mpi := sys.modules.get("mpi4py.MPI"):
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _launched_as(*names: str, default: int = 0) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _slurm_local_size() -> int:
    """Tasks on this node: SLURM_STEP_TASKS_PER_NODE is like "2(x3),1", node by node."""
    nodes = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeat = part.partition("(x")
        nodes += [int(count)] * int(repeat.rstrip(")") or 1)
    return nodes[min(int(os.environ.get("SLURM_NODEID", "0")), len(nodes) - 1)]


def _redirect_output(path: Path) -> None:
    """Sends stdout and stderr, of C libraries too, to the rank's log."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _write_status(world_dir: Path, rank: int, **status: object) -> None:
    temporary = world_dir / f".{status_name(rank)}"
    temporary.write_text(json.dumps({"time": time.time(), **status}))
    temporary.replace(world_dir / status_name(rank))


if __name__ == "__main__":
    main()
