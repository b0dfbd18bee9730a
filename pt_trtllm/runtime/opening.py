"""Opens a rank's engine, connected to the other ranks."""

from __future__ import annotations

import time
from pathlib import Path

from pt_trtllm import env
from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.coding import NO_CODING, Coding
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.engine.registry import backend_module
from pt_trtllm.mapping import Mapping
from pt_trtllm.runtime.core import Engine
from pt_trtllm.runtime.options import RuntimeOptions


def connect(mapping: Mapping, fusion_coding: Coding = NO_CODING) -> Communicator:
    """This rank's way to the others."""
    if mapping.world_size == 1:
        return LocalCommunicator()
    from pt_trtllm.comm.mpi import MpiCommunicator

    return MpiCommunicator(
        mapping,
        timeout_s=env.COMM_TIMEOUT_S.get(),
        load_timeout_s=env.LOAD_TIMEOUT_S.get(),
        fusion_coding=fusion_coding,
    )


def open_engine(
    engine_dir: Path, config: EngineConfig, comm: Communicator, options: RuntimeOptions
) -> tuple[Engine, RuntimeOptions]:
    """Opens this rank's engine once rank 0 has settled the size of everybody's KV cache."""
    settled = comm.broadcast(options.settled(config).to_bytes() if comm.rank == 0 else None)
    options = RuntimeOptions.from_bytes(settled)
    start = time.perf_counter()
    engine: Engine = backend_module(config.backend).open_engine(
        engine_dir, config, comm, options.num_blocks(config), options.kv_cache_dtype
    )
    print(f"rank {comm.rank}: loaded {engine_dir} in {time.perf_counter() - start:.2f} s", flush=True)
    comm.barrier()  # loading takes each rank its own time
    return engine, options
