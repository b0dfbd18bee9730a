"""The engine below a server is watched: what stands still is ended and started again."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm import SamplingParams
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.processes import command_line, descendants
from pt_trtllm.runtime.request import Request
from pt_trtllm.serving.supervisor import EngineSettings, EngineSupervisor, Unavailable
from pt_trtllm.testing.processes import wait_until_gone

pytestmark = pytest.mark.mpi

LONG_PROMPT = 32_000
"""Tokens of one step that takes a minute of a core: attention looks at each pair of them."""
STEP_TIMEOUT_S = 10.0
"""Short beside that step, long beside any pause of a short one."""
CHUNK, MANY_CHUNKS_TIMEOUT_S = 8, 2.0
"""Tokens of a step that takes some milliseconds, and a time for hundreds of them."""
ATTEMPTS, SOCKET_TAKES = 5, 8
"""Requests with long prompts: more than the socket between a rank and its client holds."""
SOON_S = 240.0


@dataclass
class Watched:
    """An engine, and what its owner hears of it; this owner fails whenever it hears something."""

    engine_dir: Path
    engine: EngineSupervisor = field(init=False)
    changes: list[tuple[bool, str]] = field(default_factory=list)
    num_recoveries: int = 0

    def on_change(self, is_ready: bool, reason: str) -> None:
        self.changes.append((is_ready, reason))
        self.num_recoveries += is_ready
        raise RuntimeError("whoever listens has a mistake")

    def ranks(self) -> list[int]:
        return [pid for pid in descendants(os.getpid()) if os.fsencode(self.engine_dir) in command_line(pid)]

    def wait_until_back(self) -> None:
        wait_until(lambda: bool(self.changes) and self.changes[-1][0], "the engine is back")
        assert not isinstance(ask(self.engine, 4), BaseException)
        assert self.engine.num_in_flight == 0


@contextlib.contextmanager
def watched(folder: Path, limits: BuildLimits, step_timeout_s: float) -> Iterator[Watched]:
    ((_, engine_dir),) = make_engines(ShapeOptions(shape=SHAPES["tiny"], models=("one",), world_size=1), limits, folder)
    owner = Watched(engine_dir)
    settings = EngineSettings(engine_dir=engine_dir, step_timeout_s=step_timeout_s)
    owner.engine = EngineSupervisor(settings, owner.on_change)
    try:
        yield owner
    finally:
        owner.engine.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    limits = BuildLimits(max_batch_size=2, max_seq_len=LONG_PROMPT + 8, max_num_tokens=LONG_PROMPT)
    with watched(tmp_path_factory.mktemp("shared"), limits, STEP_TIMEOUT_S) as owner:
        yield owner


@pytest.fixture
def owner(shared: Watched) -> Iterator[Watched]:
    """Runs, and is left running, whatever a test made of it; no news of one test reaches the next."""
    shared.changes.clear()
    try:
        yield shared
    finally:
        wait_until(lambda: isinstance(answer_or_refusal(shared.engine), tuple), "the engine is well again")
        wait_until(lambda: shared.num_recoveries == shared.engine.num_restarts, "its owner has heard of it")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON_S:g} s: {what}"
        time.sleep(0.01)


def request_of(length: int, first: int = 0, max_tokens: int = 2) -> Request:
    prompt = tuple((first + index) % 256 for index in range(length))
    return Request(prompt_ids=prompt, params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def last_event(events: queue.SimpleQueue[Any]) -> Any:
    """How a request ended."""
    while True:
        event = events.get(timeout=SOON_S)
        if isinstance(event, BaseException) or event[2]:
            return event


def ask(engine: EngineSupervisor, length: int, first: int = 0) -> Any:
    """The last event of a request."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.submit([(request_of(length, first), events)])
    return last_event(events)


def answer_or_refusal(engine: EngineSupervisor) -> Any:
    try:
        return ask(engine, 4)
    except Unavailable as error:
        return error


def test_an_engine_without_progress_is_ended_and_started_again(owner: Watched) -> None:
    engine, restarts = owner.engine, owner.engine.num_restarts
    assert not isinstance(ask(engine, 4), BaseException)
    failure = ask(engine, LONG_PROMPT)
    assert isinstance(failure, PtError)
    assert failure.kind == "unavailable"
    assert "no step ended for 10 s with 1 requests in flight (step_timeout_s)" in str(failure)
    assert engine.num_in_flight == 0
    meanwhile = answer_or_refusal(engine)  # an answer if it is back already
    assert isinstance(meanwhile, tuple) or "no step ended" in str(meanwhile)
    owner.wait_until_back()
    assert [is_ready for is_ready, _ in owner.changes] == [False, True]
    assert engine.num_restarts == restarts + 1


def test_a_rank_that_reads_nothing_holds_nobody_up(owner: Watched) -> None:
    """Many times what the socket between the two takes. Whoever submits, cancels or closes is not held up, and whoever
    watches can end the rank."""
    engine = owner.engine

    def submit(events: queue.SimpleQueue[Any]) -> list[int]:
        if owner.changes:  # it was noticed: this one is for the next rank, or for none
            return []
        try:
            return engine.submit([(request_of(LONG_PROMPT), events)])
        except Unavailable:  # it was noticed before
            return []

    for _ in range(ATTEMPTS):
        (victim,) = owner.ranks()
        queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(60)]
        os.kill(victim, signal.SIGSTOP)
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(submit, queues, timeout=SOON_S))
        for (request_id,) in filter(None, ids[:10]):
            engine.cancel(request_id)
        failures = [last_event(events) for events, own in zip(queues, ids, strict=True) if own]
        assert all("was stopped by a signal and does not answer" in str(failure) for failure in failures), failures
        owner.wait_until_back()
        wait_until_gone([victim])
        if len(failures) > SOCKET_TAKES:
            break
        owner.changes.clear()
    else:
        pytest.fail(f"the rank was ended before it was sent {SOCKET_TAKES} requests, {ATTEMPTS} times")


def test_a_start_that_fails_for_any_reason_is_tried_again(owner: Watched, tmp_path: Path) -> None:
    folders = tempfile.gettempdir()
    tempfile.tempdir = str(tmp_path / "not there yet")
    try:
        os.kill(owner.ranks()[0], signal.SIGKILL)
        wait_until(lambda: sum("FileNotFoundError" in reason for _, reason in owner.changes) >= 2, "two starts failed")
        with pytest.raises(Unavailable, match="the engine is being restarted: FileNotFoundError at its start"):
            owner.engine.submit([(request_of(4), queue.SimpleQueue())])
        (tmp_path / "not there yet").mkdir()
        owner.wait_until_back()
    finally:
        tempfile.tempdir = folders
        os.kill(owner.ranks()[0], signal.SIGKILL)  # the folder in use goes away
        wait_until(lambda: owner.changes.count((True, "")) == 2, "the engine is back")


def test_a_late_cancellation_reaches_no_request_of_the_next_world(tmp_path: Path) -> None:
    """The first request of one world, then those of the next: a world that counted its own would mix them up."""
    limits = BuildLimits(max_batch_size=2, max_seq_len=LONG_PROMPT, max_num_tokens=64)
    with watched(tmp_path, limits, STEP_TIMEOUT_S) as owner:
        engine, lost = owner.engine, queue.SimpleQueue[Any]()
        (old,) = engine.submit([(request_of(4, max_tokens=30_000), lost)])
        os.kill(owner.ranks()[0], signal.SIGKILL)
        assert isinstance(last_event(lost), BaseException)
        wait_until(lambda: owner.num_recoveries == 1, "the engine is back")
        queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(4)]
        new = [engine.submit([(request_of(4, max_tokens=64), events)])[0] for events in queues]
        engine.cancel(old)
        assert old not in new
        assert {last_event(events)[2] for events in queues} == {"length"}


def test_a_rank_that_is_stopped_while_it_starts_is_ended(owner: Watched) -> None:
    (first,) = owner.ranks()
    os.kill(first, signal.SIGKILL)
    wait_until_gone([first])
    wait_until(lambda: bool(owner.ranks()), "a new rank")
    os.kill(second := owner.ranks()[0], signal.SIGSTOP)
    wait_until(lambda: any("was stopped by a signal" in reason for _, reason in owner.changes), "it was noticed")
    owner.wait_until_back()
    wait_until_gone([second])


def test_more_answers_than_there_can_ever_be_room_for_are_not_to_be_asked_again(owner: Watched) -> None:
    """A full queue has room later: clients wait for that."""
    most = 2 + 256  # the batch, and the queue
    with pytest.raises(
        ConfigError, match=rf"asks for {most + 1} answers .* the batch and the queue hold {most}"
    ) as caught:
        owner.engine.submit([(request_of(4), queue.SimpleQueue())] * (most + 1))
    assert caught.value.kind == "invalid"
    assert owner.engine.num_in_flight == 0


def test_a_queue_that_takes_no_events_ends_its_own_request_only(owner: Watched) -> None:
    class Broken:
        def put(self, event: Any) -> None:
            raise RuntimeError("Event loop is closed")

    other: queue.SimpleQueue[Any] = queue.SimpleQueue()
    owner.engine.submit([(request_of(4, max_tokens=30_000), Broken()), (request_of(8, max_tokens=8), other)])
    assert last_event(other)[2] == "length"
    wait_until(lambda: owner.engine.num_in_flight == 0, "the request was ended")
    assert owner.changes == []


def test_steps_are_progress_though_they_give_no_tokens(tmp_path: Path) -> None:
    """A prompt of so many chunks that it takes longer than a step may, on whatever machine."""
    limits = BuildLimits(max_batch_size=1, max_seq_len=1 << 15, max_num_tokens=CHUNK)
    with watched(tmp_path, limits, MANY_CHUNKS_TIMEOUT_S) as owner:
        length, num_pauses = 1 << 10, 0
        for attempt in itertools.count():
            started = time.monotonic()
            event = ask(owner.engine, length - 8, first=attempt)
            if isinstance(event, BaseException):  # every time, or because the rank itself was kept from going on?
                num_pauses += 1
                assert num_pauses < ATTEMPTS, f"{length} tokens: {event}"
                wait_until(lambda: isinstance(answer_or_refusal(owner.engine), tuple), "the engine is back")
            elif time.monotonic() - started > 2 * MANY_CHUNKS_TIMEOUT_S:
                break
            else:
                length *= 2
                assert length <= 1 << 15, "this machine computes the longest prompt within the time of a step"


def test_an_engine_can_be_closed_while_it_starts(tmp_path: Path) -> None:
    limits = BuildLimits(max_batch_size=1, max_seq_len=64, max_num_tokens=64)
    with watched(tmp_path, limits, STEP_TIMEOUT_S) as owner:
        (first,) = owner.ranks()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: owner.ranks() not in ([first], []), "it is being started again")
        closing = threading.Thread(target=owner.engine.close)
        closing.start()
        closing.join(SOON_S)
        assert not closing.is_alive()
        assert not owner.ranks()
