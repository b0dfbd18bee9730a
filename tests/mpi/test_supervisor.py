"""The engine below a server is watched: what stands still is ended and started again."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm import SamplingParams
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.errors import PtError
from pt_trtllm.runtime.request import Request
from pt_trtllm.serving.supervisor import EngineSettings, EngineSupervisor, Unavailable

pytestmark = pytest.mark.mpi

LONG_PROMPT = 32_000
"""Tokens of one step that takes a minute of a core: attention looks at each pair of them."""
STEP_TIMEOUT_S = 10.0
"""Short beside that step, long beside any pause of a short one."""
SOON_S = 120.0


def ask(engine: EngineSupervisor, length: int) -> Any:
    """The last event of a request: how it ended."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = Request(prompt_ids=tuple(index % 256 for index in range(length)), params=SamplingParams(max_tokens=2))
    engine.submit([(request, events)])
    while True:
        event = events.get(timeout=SOON_S)
        if isinstance(event, BaseException) or event[2]:
            return event


def answer_or_refusal(engine: EngineSupervisor) -> Any:
    try:
        return ask(engine, 4)
    except Unavailable as error:
        return error


def test_an_engine_without_progress_is_ended_and_started_again(tmp_path: Path) -> None:
    limits = BuildLimits(max_batch_size=2, max_seq_len=LONG_PROMPT + 8, max_num_tokens=LONG_PROMPT)
    ((_, engine_dir),) = make_engines(
        ShapeOptions(shape=SHAPES["tiny"], models=("one",), world_size=1), limits, tmp_path
    )
    changes: list[tuple[bool, str]] = []
    is_back = threading.Event()

    def on_change(is_ready: bool, reason: str) -> None:
        changes.append((is_ready, reason))
        if is_ready:
            is_back.set()

    engine = EngineSupervisor(EngineSettings(engine_dir=engine_dir, step_timeout_s=STEP_TIMEOUT_S), on_change)
    try:
        assert not isinstance(ask(engine, 4), BaseException)
        failure = ask(engine, LONG_PROMPT)
        assert isinstance(failure, PtError)
        assert "no token came for 10 s with 1 requests in flight (step_timeout_s)" in str(failure)
        assert engine.num_in_flight == 0
        meanwhile = answer_or_refusal(engine)  # an answer if it is back already
        assert isinstance(meanwhile, tuple) or "no token came" in str(meanwhile)
        assert is_back.wait(SOON_S)
        assert not isinstance(ask(engine, 4), BaseException)
    finally:
        engine.close()
    assert [is_ready for is_ready, _ in changes] == [False, True]
    assert engine.num_restarts == 1
