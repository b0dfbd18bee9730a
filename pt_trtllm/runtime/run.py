"""Answers a batch of requests with an engine: in this process for one rank, over launched ranks for more."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.generate import generate
from pt_trtllm.runtime.job import Job, read_context_logits
from pt_trtllm.runtime.launch import run_world
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.worker import open_engine, share_cores

Progress = Callable[[int, int], None]
INSIDE_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    outputs: list[dict[str, Any]]
    """Per request: output_ids and finish_reason."""
    stats: dict[str, Any]
    context_logits: dict[str, torch.Tensor]
    """float32 [prompt tokens, vocabulary] by request index, for requests that asked."""


def run(
    engine_dir: Path,
    requests: Sequence[Request],
    *,
    hostfile: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> RunResult:
    """Checks every request against the engine before anything is started."""
    config, _ = open_bundle(engine_dir)
    if not requests:
        raise ConfigError("no prompt given; expected at least one")
    for index, request in enumerate(requests):
        request.check(config, f"prompt {index}")
    launched = [name for name in INSIDE_MPI if int(os.environ.get(name, "1")) > 1]
    if launched:
        raise ConfigError(
            f"started by an MPI launcher ({launched[0]} is set); start it directly: it launches its ranks itself"
        )
    job_dir = Path(tempfile.mkdtemp(prefix="pt-trtllm-"))
    try:
        if config.mapping.world_size == 1:
            share_cores(0, 1)
            Job.write_results(
                job_dir, *generate(open_engine(engine_dir, config, LocalCommunicator()), requests, progress)
            )
        else:
            Job(requests=tuple(requests)).write(job_dir)
            run_world(
                config.mapping.world_size,
                engine_dir.resolve(),
                job_dir,
                lambda line: _forward(line, progress),
                hostfile,
            )
        results = Job.read_results(job_dir)
        logits_path = job_dir / "context_logits.safetensors"
        logits = read_context_logits(logits_path) if logits_path.is_file() else {}
    finally:
        shutil.rmtree(job_dir, ignore_errors=True)
    return RunResult(outputs=results["outputs"], stats=results["stats"], context_logits=logits)


def _forward(line: str, progress: Progress) -> None:
    try:
        report = json.loads(line)
        progress(report["done"], report["total"])
    except (ValueError, TypeError, KeyError):
        return  # a launcher's own chatter
