"""What ranks report when one of them is dead, stopped, wrong or gone."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pt_trtllm.comm.track_fusion import ShmGroup, library_path
from pt_trtllm.errors import CommunicationError

sys.path.insert(0, str(Path(__file__).parent))  # the ranks import their tasks by name
import track_fusion_procs as procs

pytestmark = pytest.mark.unit

SHM = Path("/dev/shm")
PREFIX = "pt-track-fusion-"


def segments() -> set[Path]:
    return set(SHM.glob(f"{PREFIX}*"))


def wait_until_gone(left: set[Path]) -> None:
    """A group of another test that runs meanwhile loses its name by itself, as soon as all of its ranks are there."""
    deadline = time.monotonic() + procs.DEADLINE_S
    while left := {path for path in left if path.exists()}:
        assert time.monotonic() < deadline, f"left in shared memory: {left}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pool() -> Iterator[procs.RankPool]:
    try:
        library_path()
    except CommunicationError as error:
        pytest.skip(str(error))
    pool = procs.RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    before = segments()
    yield
    wait_until_gone(segments() - before)


def test_a_killed_rank_is_named_by_all_others(pool: procs.RankPool) -> None:
    job = pool.start(4, procs.reduce_for_ever, 0.0)
    time.sleep(0.2)
    job.kill(2)
    for rank in (0, 1, 3):
        error = job.error(rank)
        assert "CommunicationError" in error
        assert re.search(rf"waited \d+\.\d s for rank 2 \(pid {job.pid(2)}, call \d+\)", error)
        assert "all_reduce(float32 [256]): the process is gone" in error


def test_all_ranks_killed_leave_no_name_behind(pool: procs.RankPool) -> None:
    before = segments()
    job = pool.start(2, procs.reduce_for_ever, 0.0)
    for rank in (0, 1):
        job.kill(rank)
    wait_until_gone(segments() - before)


def test_a_stopped_rank_is_named_as_alive(pool: procs.RankPool) -> None:
    job = pool.start(2, procs.reduce_for_ever, 5.0)
    time.sleep(0.2)
    os.kill(job.pid(1), signal.SIGSTOP)
    try:
        error = job.error(0)
    finally:
        os.kill(job.pid(1), signal.SIGCONT)
    assert re.search(rf"rank 0 waited \d+\.\d s for rank 1 \(pid {job.pid(1)}, call \d+\)", error)
    assert "the process is alive but did not arrive" in error
    assert "rank 0 aborted the group: track_fusion: rank 0 waited" in job.error(1)


@pytest.mark.parametrize(
    ("task", "named"),
    [
        (procs.call_different_operations, ["fuse(mean, float32 [2, 8])", "all_reduce(float32 [16])"]),
        (procs.call_different_shapes, ["fuse(mean, bfloat16 [2, 8])", "fuse(mean, bfloat16 [3, 8])"]),
    ],
    ids=["operation", "shape"],
)
def test_ranks_that_diverge_are_told_both_calls(pool: procs.RankPool, task: object, named: list[str]) -> None:
    assert callable(task)
    job = pool.start(2, task)
    for rank in (0, 1):
        error = job.error(rank)
        assert "ranks diverged at call" in error
        for text in named:
            assert text in error


def test_an_abort_reaches_a_rank_that_waits_for_ever(pool: procs.RankPool) -> None:
    job = pool.start(3, procs.abort_on_rank_one)
    assert job.outcome(1) == (True, None)
    for rank in (0, 2):
        assert "rank 1 aborted the group: out of patience" in job.error(rank)


def test_a_failed_group_repeats_its_first_reason(pool: procs.RankPool) -> None:
    job = pool.start(2, procs.keep_failing, timeout_s=0.3)
    succeeded, errors = job.outcome(0)
    job.kill(1)
    assert succeeded, errors
    first, second, third = errors
    assert "in barrier: the process is alive but did not arrive" in first
    for later in (second, third):
        assert later == f"track_fusion: the group failed earlier and cannot be used any more: {first}"


def test_an_idle_rank_sleeps_until_the_next_command(pool: procs.RankPool) -> None:
    results = pool.run(2, procs.wait_for_command)
    assert [command for _, command in results] == [42, 42]
    assert results[1][0] < 0.5, "the idle rank burned its core"


def test_an_idle_rank_notices_that_rank_zero_died(pool: procs.RankPool) -> None:
    job = pool.start(2, procs.wait_for_command)
    job.kill(0)
    assert re.search(rf"for rank 0 \(pid {job.pid(0)}, .*the process is gone", job.error(1))


def test_an_idle_rank_still_runs_its_signal_handlers(pool: procs.RankPool) -> None:
    job = pool.start(2, procs.wait_with_signal_handler)
    assert "InterruptedError: signal 15" in job.error(1)
    job.kill(0)


def test_a_rank_that_never_attaches_is_named(pool: procs.RankPool) -> None:
    with ShmGroup.create(size=2, timeout_s=0.2) as group:
        with pytest.raises(CommunicationError, match=r"rank 0 waited \d+\.\d s in unlink: 1 of 2 ranks have attached"):
            group.unlink()
        with pytest.raises(CommunicationError, match=r"for rank 1 \(pid 0, call 1\) in barrier: it has not attached"):
            group.barrier()


def test_an_unknown_name_is_refused(pool: procs.RankPool) -> None:
    with pytest.raises(CommunicationError, match="No such file or directory"):
        ShmGroup.attach(f"/{PREFIX}0123", rank=1, size=2)
    with pytest.raises(CommunicationError, match="'/somebody-else' is not a group name"):
        ShmGroup.attach("/somebody-else", rank=1, size=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"short", "not a track fusion segment"), (b"\1" * 65536, "not a track fusion segment")],
    ids=["short", "foreign"],
)
def test_a_foreign_segment_is_refused(pool: procs.RankPool, content: bytes, message: str) -> None:
    path = SHM / f"{PREFIX}test-{os.getpid()}"
    path.write_bytes(content)
    try:
        with pytest.raises(CommunicationError, match=message):
            ShmGroup.attach(f"/{path.name}", rank=1, size=2)
    finally:
        path.unlink()


def test_a_damaged_segment_is_refused(pool: procs.RankPool) -> None:
    with ShmGroup.create(size=2, capacity_bytes=4096) as group:
        os.truncate(SHM / group.name[1:], 8192)
        with pytest.raises(CommunicationError, match="has 8192 bytes and says"):
            ShmGroup.attach(group.name, rank=1, size=2)
        with pytest.raises(CommunicationError, match="is a group of 2 ranks, expected 3"):
            ShmGroup.attach(group.name, rank=1, size=3)


def test_a_segment_that_does_not_fit_is_refused_with_the_space_needed(pool: procs.RankPool) -> None:
    space = os.statvfs(SHM)
    capacity_bytes = 1 << 30
    if space.f_blocks * space.f_frsize > 2 * 64 * capacity_bytes:
        pytest.skip("/dev/shm is larger than the largest group")
    with pytest.raises(CommunicationError, match=r"shared memory is full: the group needs \d+ bytes in /dev/shm"):
        ShmGroup.create(size=64, capacity_bytes=capacity_bytes)


def refusal_to_unlink(group: ShmGroup) -> str:
    """A call that harms nothing while a rank is missing."""
    with pytest.raises(CommunicationError) as caught:
        group.unlink(timeout_s=0.001)
    return str(caught.value)


def test_a_second_thread_is_refused_and_may_abort(pool: procs.RankPool) -> None:
    group = ShmGroup.create(size=2, timeout_s=30.0)
    errors: list[str] = []

    def wait() -> None:
        while not errors:
            try:
                group.barrier()
            except CommunicationError as error:
                if "in use by another thread" not in str(error):  # by the one that asks whether this one waits
                    errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    while "in use by another thread" not in refusal_to_unlink(group):
        assert not errors
        time.sleep(0.01)
    with pytest.raises(CommunicationError, match="in use by another thread"):
        group.barrier()
    with pytest.raises(CommunicationError, match="in use by another thread"):
        group.close()
    group.abort("enough")
    thread.join(procs.DEADLINE_S)
    group.close()
    assert errors
    assert "aborted the group: enough" in errors[0]


def test_an_error_inside_the_context_aborts_the_group(pool: procs.RankPool) -> None:
    other = None
    with contextlib.suppress(ValueError), ShmGroup.create(size=2) as group:
        other = ShmGroup.attach(group.name, rank=1, size=2)
        raise ValueError("bad weights")
    assert other is not None
    with other, pytest.raises(CommunicationError, match="rank 0 aborted the group: ValueError: bad weights"):
        other.all_reduce(torch.ones(1))


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PT_PLUGIN_LIBRARY", raising=False)
    monkeypatch.setattr("pt_trtllm.__path__", [str(tmp_path)])
    with pytest.raises(CommunicationError, match=r"libpt_track_fusion.so not found .*Build it with"):
        library_path()
    monkeypatch.setenv("PT_PLUGIN_LIBRARY", str(tmp_path / "nowhere.so"))
    with pytest.raises(CommunicationError, match=r"PT_PLUGIN_LIBRARY is .*no such file"):
        library_path()
