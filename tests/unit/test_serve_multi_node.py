"""The script for several nodes hands SIGTERM on and waits for the server; a small program stands for the server."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).parents[2] / "scripts/serve_multi_node.sh"
STAND_IN = """#!/usr/bin/env python3
import signal, sys, time
def end(number, frame):
    time.sleep(0.2)
    print("ended in peace", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print(" ".join(sys.argv[1:]), flush=True)
while sys.argv[1] == "serve":
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_server(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pt-trtllm").write_text(STAND_IN)
    (tmp_path / "bin/pt-trtllm").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "tmp")}
    command = ["bash", str(SCRIPT), "engine", "hosts", "--grpc-port", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        assert script.stdout.readline().startswith("deploy --engine-dir engine")
        assert script.stdout.readline().endswith("--grpc-port 0\n")
        script.send_signal(number)
        assert script.stdout.read() == "ended in peace\n"
        assert script.wait(60) == 7
    assert list((tmp_path / "tmp").iterdir()) == []
