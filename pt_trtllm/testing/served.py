"""`pt-trtllm serve` as a user starts it, on free ports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm.processes import command_line, descendants
from pt_trtllm.testing.triton import wait_until

START_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Served:
    process: subprocess.Popen[bytes]
    printed: Path
    """What it says."""
    grpc_url: str
    http_url: str
    metrics_url: str

    @property
    def started(self) -> set[int]:
        """All processes below it."""
        return descendants(self.process.pid)

    def pid_of(self, words: bytes) -> int:
        """The one process below it with these words in its command line."""
        (found,) = (pid for pid in self.started if words in command_line(pid))
        return found

    @property
    def triton(self) -> int:
        return self.pid_of(b"tritonserver\0--")

    @property
    def folder(self) -> Path:
        """Its private one."""
        arguments = command_line(self.pid_of(b"serving.guardian")).split(b"\0")
        return Path(os.fsdecode(arguments[-2]))


@contextmanager
def served(repository: Path, *, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "out"
        with printed.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "pt_trtllm.cli.main", "serve", "--model_repository", str(repository),
                 "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--exit-timeout-s", "60"],
                stdout=out, stderr=out, env={**os.environ, **(env or {})},
            )  # fmt: skip
        try:
            ready = re.compile(r"ready: gRPC (\S+), HTTP (\S+), metrics (\S+)")

            def is_ready() -> bool:
                assert process.poll() is None, printed.read_text()
                return ready.search(printed.read_text()) is not None

            wait_until(is_ready, START_S, "the server is ready")
            found = ready.search(printed.read_text())
            assert found is not None
            grpc_url, http_url, metrics_url = found.groups()
            yield Served(
                process=process, printed=printed, grpc_url=grpc_url, http_url=http_url, metrics_url=metrics_url
            )
        finally:
            process.kill()
            process.wait()
