"""Tests that are told to end leave no process behind, not even one that has lost its parent."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pt_trtllm.testing.processes import wait_until_gone

pytestmark = pytest.mark.unit

ORPHAN = """
import pathlib, subprocess, time

def test_that_waits() -> None:
    subprocess.run(["sh", "-c", "sleep 3600 & echo $! > started; mv started orphan"], check=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_orphan.py").write_text(ORPHAN)
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (tmp_path / "orphan").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        orphan = int((tmp_path / "orphan").read_text())
        process.send_signal(number)
        out, _ = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2, out
    assert f"left by the tests, and ended now: {orphan} sleep 3600" in out
    wait_until_gone([orphan])
