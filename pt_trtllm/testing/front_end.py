"""The OpenAI front end as a user starts it: `pt-trtllm openai`, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S, STOP_S = 240.0, 240.0
API_KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")
"""Of the front end that asks for one."""


@dataclass
class FrontEnd:
    address: str
    """http://host:port, or https"""
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """Asks it to end, and gives its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


@contextmanager
def front_end(*options: object, env: Mapping[str, str] | None = None) -> Iterator[FrontEnd]:
    with tempfile.NamedTemporaryFile(prefix="pt-openai-", suffix=".log") as log:
        command = [sys.executable, "-m", "pt_trtllm.cli.main", "openai", "--port", "0", *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **(env or {})})
        try:
            yield FrontEnd(_address(Path(log.name), process), process, Path(log.name))
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if match := re.search(r"playground at (https?://\S+),", log.read_text()):
            return match[1]
        assert process.poll() is None, f"the front end ended with {process.returncode}: {log.read_text()[-3000:]}"
        time.sleep(0.05)
    raise AssertionError(f"the front end did not start within {START_S:.0f} s: {log.read_text()[-3000:]}")
