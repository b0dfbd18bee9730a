"""One MPI rank of the codec tests: fusions over pretended hosts, then the example model under every coding.

mpirun -n 4 python fusion_codec_ranks.py ENGINE_DIR OUTPUT_DIR
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.coding import ALGORITHMS, CODECS, NO_CODING, Coding, decode, encode
from pt_trtllm.comm.mpi import MpiCommunicator
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.mapping import Mapping
from pt_trtllm.runtime.core import follow
from pt_trtllm.runtime.generate import generate
from pt_trtllm.runtime.opening import connect, open_engine
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.testing.jobs import Job, write_context_logits

LAYOUTS = ([0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 2, 3])
"""For every rank, the first rank of its host."""
SHAPES = ((0, 64), (1, 64), (3, 200), (90, 256))
CODINGS = [
    Coding(codec=codec, delta=delta, algorithm=algorithm)
    for codec in CODECS[1:]
    for delta in (False, True)
    for algorithm in ALGORITHMS[1:]
]
WORLD = MPI.COMM_WORLD


def through(codec: str, x: torch.Tensor) -> torch.Tensor:
    return decode(codec, encode(codec, x), *x.shape)


def expected(inputs: list[torch.Tensor], base: torch.Tensor, hosts: list[int], op: str, coding: Coding) -> torch.Tensor:
    """The documented rules in plain steps: inside a host everything counts, between hosts what was decoded."""
    own = [x.float() - base.float() if coding.delta else x.float() for x in inputs]
    one_host = len(set(hosts)) == 1
    terms = (
        own if one_host else [sum_of([own[r] for r in range(4) if hosts[r] == first]) for first in sorted(set(hosts))]
    )
    total = sum_of([through(coding.codec, term) for term in terms])
    if one_host:
        total = total * (0.25 if op == "mean" else 1.0)
    if coding.algorithm == "two_shot":
        total = through(coding.codec, total)
    if not one_host:
        total = total * (0.25 if op == "mean" else 1.0)
    return (base.float() + total if coding.delta else total).to(base.dtype)


def sum_of(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def check_layouts() -> None:
    for hosts in LAYOUTS:
        MpiCommunicator._hosts = lambda self, hosts=hosts: hosts  # type: ignore[method-assign, misc]
        for coding in CODINGS:
            comm = MpiCommunicator(
                Mapping(world_size=4, num_tracks=4), timeout_s=30, load_timeout_s=30, fusion_coding=coding
            )
            generator = torch.Generator().manual_seed(1)
            for shape in SHAPES:
                for dtype in (torch.float32, torch.bfloat16):
                    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
                    base = torch.randn(shape, generator=generator).to(dtype)
                    for op in ("mean",) if coding.delta else ("mean", "sum"):
                        found = comm.track_fusion(inputs[comm.rank], op, base)
                        wanted = expected(inputs, base, hosts, op, coding)
                        assert torch.equal(found, wanted), (hosts, coding, shape, dtype, op)
            comm.barrier()
            comm.close()


class Recorder:
    """A communicator that remembers what was fused."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.digest = hashlib.sha256()

    def track_fusion(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None = None) -> torch.Tensor:
        fused = self._comm.track_fusion(hidden, op, base)
        self.digest.update(fused.contiguous().view(torch.uint8).numpy().tobytes())
        return fused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def run_model(engine_dir: Path, output_dir: Path) -> None:
    config, _ = open_bundle(engine_dir)
    results = []
    for index, coding in enumerate((NO_CODING, *CODINGS)):
        comm = Recorder(connect(config.mapping, coding))
        engine, options = open_engine(engine_dir, config, comm, RuntimeOptions())
        tokens: list[list[int]] = []
        if comm.rank == 0:
            sequences, _ = generate(engine, Job.read(output_dir).requests, options)
            write_context_logits(output_dir / f"{index}.safetensors", sequences)
            tokens = [sequence.output_ids for sequence in sequences]
        else:
            follow([engine])
        digests = WORLD.allgather(comm.digest.hexdigest())
        results.append({"coding": dataclasses.asdict(coding), "tokens": tokens, "digests": digests})
        comm.barrier()
        comm.close()
    if WORLD.rank == 0:
        (output_dir / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_hosts = MpiCommunicator._hosts
    check_layouts()
    MpiCommunicator._hosts = own_hosts  # type: ignore[method-assign]
    run_model(Path(sys.argv[1]), Path(sys.argv[2]))
