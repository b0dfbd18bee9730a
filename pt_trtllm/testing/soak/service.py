"""A server that is started again whenever it ends, as an init system would, with an OpenAI front end before it."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from pt_trtllm.processes import command_line, descendants
from pt_trtllm.testing.front_end import FrontEnd, front_end

READY_S, STOP_S = 300.0, 120.0
READY = re.compile(r"^ready: gRPC \S+:(\d+), HTTP \S+:(\d+), metrics \S+:(\d+)/", re.M)


class KeptService:
    """`pt-trtllm serve` and `pt-trtllm openai` as a user runs them. Use it in a `with` block."""

    def __init__(self, repository: Path, tokenizer_dir: Path, folder: Path) -> None:
        self._repository, self._tokenizer_dir, self._folder = repository, tokenizer_dir, folder
        self._ports = ["0", "0", "0"]
        """gRPC, HTTP, metrics: free ones at first, and the same ones from then on."""
        self._closing = threading.Event()
        self.num_starts = 0
        self.failed_starts: list[str] = []
        self.log_file = folder / "tritonserver.log"

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self._ports[2]}/metrics"

    @property
    def pid(self) -> int:
        return self._process.pid

    def processes(self) -> set[int]:
        return {self.pid, self.front.process.pid} | descendants(self.pid) | descendants(self.front.process.pid)

    def model_processes(self) -> list[int]:
        """Those in which Triton runs Python models."""
        return sorted(pid for pid in descendants(self.pid) if b"triton_python_backend_stub" in command_line(pid))

    def __enter__(self) -> KeptService:
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self._start()
            options = ["--url", self.grpc_url, "--metrics-url", self.metrics_url]
            options += ["--tokenizer-dir", str(self._tokenizer_dir), "--served-model-name", "soaked"]
            self.front: FrontEnd = stack.enter_context(front_end(*options))
            self._keeper = threading.Thread(target=self._keep, name="keeper")
            self._keeper.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._keeper.join()
        self._stack.close()

    def _end(self) -> None:
        """The server, also where the front end did not start."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        finally:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self.num_starts += 1
        printed = self._folder / f"serve-{self.num_starts}.out"
        command = [sys.executable, "-m", "pt_trtllm.cli.main", "serve", "--model-repository", str(self._repository)]
        for name, port in zip(("grpc", "http", "metrics"), self._ports, strict=True):
            command += [f"--{name}-port", port]
        with printed.open("wb") as out:
            self._process = subprocess.Popen([*command, "--log-file", str(self.log_file)], stdout=out, stderr=out)
        give_up = time.monotonic() + READY_S
        while not (ready := READY.search(printed.read_text(errors="replace"))):
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server did not start: {printed.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self._ports = list(ready.groups())

    def _keep(self) -> None:
        while not self._closing.wait(0.1):
            if self._process.poll() is not None:
                try:
                    self._start()
                except RuntimeError as error:
                    self.failed_starts.append(str(error))
