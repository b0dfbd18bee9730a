"""What a server leaves is found by its marks and removed, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pt_trtllm.processes import is_running
from pt_trtllm.serving.belongings import SHARED_MEMORY, Belongings, sweep_crashed
from pt_trtllm.serving.guardian import Guardian
from pt_trtllm.testing.processes import wait_until_gone

pytestmark = pytest.mark.unit

WAITING = "import os, signal; os.write(1, b'.'); signal.pause()"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Belongings]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Belongings.new()
    yield made
    made.sweep()


def start_marked(belongings: Belongings) -> int:
    """A process of the server whose parent is gone."""
    run = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {WAITING!r}], stdout=2).pid)"
    with subprocess.Popen(
        [sys.executable, "-c", run], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | belongings.environment(), start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert parent.stderr.read(1) == b"."
        return int(parent.stdout.readline())


def region_of(belongings: Belongings) -> Path:
    path = SHARED_MEMORY / f"{belongings.shm_prefix}region"
    path.touch()
    return path


def test_a_sweep_ends_and_removes_what_is_marked_alone(own: Belongings) -> None:
    other = Belongings.new()
    ours, theirs = start_marked(own), start_marked(other)
    regions = region_of(own), region_of(other)
    own.sweep()
    assert (is_running(ours), is_running(theirs)) == (False, True)
    assert [path.exists() for path in (own.folder, regions[0], other.folder, regions[1])] == [False, False, True, True]
    other.sweep()
    wait_until_gone([theirs])
    assert not regions[1].exists()


def test_what_has_an_owner_is_left_alone(own: Belongings) -> None:
    sweep_crashed()
    assert own.folder.exists()
    region = region_of(own)
    os.close(own.lock)
    sweep_crashed()
    assert not own.folder.exists()
    assert not region.exists()


def test_the_guardian_outlives_its_launcher(own: Belongings) -> None:
    guardian = Guardian(own)
    marked, region = start_marked(own), region_of(own)
    os.kill(guardian.pid, signal.SIGTERM)
    sweep_crashed()
    assert own.folder.exists(), "the guardian holds the lock"
    guardian.dismiss()
    wait_until_gone([marked])
    assert not own.folder.exists()
    assert not region.exists()
