"""What a server leaves is found by its marks and removed, and nothing else is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pt_trtllm.processes import is_running
from pt_trtllm.serving.belongings import LOCK, SHARED_MEMORY, Belongings, sweep_crashed
from pt_trtllm.serving.control import METRICS_SOCKET
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


def test_sockets_have_names_however_long_the_folder_of_temporary_files_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    made = Belongings.new()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(made.folder / METRICS_SOCKET))
    made.release()
    sweep_crashed()
    assert not made.folder.exists()


def test_what_has_an_owner_is_left_alone(own: Belongings) -> None:
    sweep_crashed()
    assert own.folder.exists()
    region = region_of(own)
    own.release()
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
    guardian.dismiss()  # as often as a server is closed


def test_a_launcher_without_its_guardian_keeps_what_it_uses(own: Belongings) -> None:
    """The next server must not sweep one that runs."""
    guardian = Guardian(own)
    os.kill(guardian.pid, signal.SIGKILL)
    wait_until_gone([guardian.pid])
    marked = start_marked(own)
    sweep_crashed()
    assert own.folder.exists()
    assert is_running(marked)
    own.sweep()
    guardian.dismiss()


def test_a_guardian_that_stands_still_is_not_waited_for_for_ever(
    own: Belongings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pt_trtllm.serving.guardian.WAIT_S", 0.2)
    guardian = Guardian(own)
    os.kill(guardian.pid, signal.SIGSTOP)
    guardian.dismiss()
    wait_until_gone([guardian.pid])


def test_names_that_others_chose_sweep_nothing(own: Belongings, tmp_path: Path) -> None:
    """A link to a folder of this user's, and a name that would match another server's shared memory."""
    region = region_of(own)
    crashed = tmp_path / f"elsewhere-{os.getpid()}"
    for folder in (crashed, tmp_path / f"{own.folder.name[:-1]}?"):
        folder.mkdir()
        (folder / LOCK).touch()
    (tmp_path / "pt-triton-link").symlink_to(crashed)
    sweep_crashed()
    assert region.exists()
    assert (crashed / LOCK).exists()
    assert own.folder.exists()
