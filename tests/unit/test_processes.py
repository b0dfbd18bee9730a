"""What /proc says about children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pt_trtllm.processes import lost_children, processor_seconds, state, take_in_orphans
from pt_trtllm.testing.triton import wait_until

pytestmark = pytest.mark.unit


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Two processes that wait."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
            for _ in range(2)
        ]
        yield [process.pid for process in started]
        for process in started:
            process.kill()


def test_children_that_ended_or_stand_still_are_lost(children: list[int]) -> None:
    child, other = children
    assert not lost_children(os.getpid()).keys() & {child, other}
    os.kill(child, signal.SIGSTOP)
    wait_until(lambda: state(child) == "T", 60, "it is stopped")
    assert lost_children(os.getpid())[child] == "was stopped by a signal"
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: child not in lost_children(os.getpid()), 60, "it goes on")
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: state(child) == "Z", 60, "it is dead")
    assert lost_children(os.getpid())[child] == "ended with SIGKILL"
    assert other not in lost_children(os.getpid())


def test_dead_children_are_taken_in_but_those_that_somebody_asks_for(children: list[int]) -> None:
    take_in_orphans(besides=())
    assert [state(pid) for pid in children] != ["X", "X"], "they live"
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: [state(pid) for pid in children] == ["Z", "Z"], 60, "they are dead")
    take_in_orphans(besides=children[:1])
    assert [state(pid) for pid in children] == ["Z", "X"]


def test_a_server_takes_the_descriptors_that_it_may_have() -> None:
    run = (
        "import resource as r; from pt_trtllm.processes import take_descriptors\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (50, 90)); take_descriptors(); take_descriptors()\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout == "(90, 90)\n"


def test_processor_time_is_also_that_of_those_below() -> None:
    with subprocess.Popen(["sh", "-c", "while :; do :; done & wait"], start_new_session=True) as shell:
        try:  # the shell itself only waits
            wait_until(lambda: processor_seconds(shell.pid) > 0.2, 60, "its child has used a core")
        finally:
            os.killpg(shell.pid, signal.SIGKILL)
    assert processor_seconds(shell.pid) == 0
