"""Answers a batch of requests on rank 0 and returns: what tests and benchmarks run inside an MPI world of their own."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

from pt_trtllm.runtime.core import Engine, EngineCore, EngineStats
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request, Sequence

Progress = Callable[[int, int], None]


def generate(
    engine: Engine,
    requests: SequenceABC[Request],
    options: RuntimeOptions,
    progress: Progress = lambda done, total: None,
) -> tuple[list[Sequence], EngineStats]:
    """Answers all requests, several at a time; releases the other ranks at the end."""
    core = EngineCore(engine, options)
    sequences = [core.add(request) for request in requests]
    done = 0
    while core.has_work():
        for sequence in core.step():
            if sequence.error is not None:
                raise sequence.error
            done += sequence.finish_reason is not None
        progress(done, len(sequences))
    stats = core.stats()
    core.stop()
    return sequences, stats
