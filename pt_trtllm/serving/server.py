"""tritonserver as a supervised child: started, waited for, explained when it fails, ended with all it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pt_trtllm.errors import ServingError
from pt_trtllm.processes import descendants, lost_children, state, take_in_orphans
from pt_trtllm.serving.addresses import answers, free_port, listen, reachable
from pt_trtllm.serving.belongings import Belongings, sweep_crashed
from pt_trtllm.serving.child import PRIVATE_UMASK, adopt_orphans, confine_server, end_with_parent
from pt_trtllm.serving.control import END, HTTP_SOCKET, METRICS_SOCKET, WAIT, DrainOrder
from pt_trtllm.serving.guardian import Guardian
from pt_trtllm.serving.server_options import TRITON_EXIT_S, ServerOptions, check_repository
from pt_trtllm.serving.tritonserver import ServerBinary, check_backends, find_tritonserver

LOG_TAIL_LINES = 15
ENDING_S = 3.0
"""For requests that did not end in time to be ended."""
LAST_PIECES_S = 0.3
"""For what the cores have sent to reach the clients."""
START_ATTEMPTS = 3
"""A port that was free a moment ago can be taken by another process."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TritonServer:
    """A running server. Close it, or use it in a `with` block; then nothing of it is left."""

    def __init__(self, repository: Path, options: ServerOptions | None = None) -> None:
        """Returns when every model is ready; raises with the server's last lines when that does not happen."""
        self.options = options or ServerOptions()
        repository = check_repository(repository)
        binary = find_tritonserver(self.options.tritonserver)
        check_backends(repository, binary, self.options.extra)
        sweep_crashed()
        adopt_orphans()
        self._belongings = Belongings.new()
        self._guardian = Guardian(self._belongings)
        self.log_file = self.options.log_file or self._belongings.folder / "tritonserver.log"
        if self.options.log_file is None:
            self.log_file.touch(0o600)
        self._lost: dict[int, str] = {}
        try:
            self._start(repository, binary)
        except BaseException:
            self.close(exit_timeout_s=0.0)
            raise

    @property
    def grpc_url(self) -> str:
        return f"{reachable(self.options.host)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{reachable(self.options.host)}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{reachable(self.options.host)}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The server's exit code; None while it runs."""
        return self._process.poll()

    def lost_process(self) -> str:
        """Which of the server's processes has died or stands still, and how; empty while all run. Triton waits for a
        model forever, and so do its clients. Asked again and again: what Triton ends itself is not dead for long."""
        if (code := self._front.poll()) is not None:
            return f"HTTP front ended with {code}"
        now, self._lost = self._lost, self._lost_now()
        lasting = sorted(now.items() & self._lost.items())
        return lasting[0][1] if lasting else ""

    def _lost_now(self) -> dict[int, str]:
        models = lost_children(self._process.pid)
        lost = {pid: f"model's process {pid} {how}" for pid, how in models.items()}
        for name, process in (("tritonserver", self._process), ("HTTP front", self._front)):
            if state(process.pid) == "T":
                lost[process.pid] = f"{name} was stopped by a signal"
        return lost

    def take_in_orphans(self) -> None:
        """Ranks whose launcher died come to this process. For a process that starts nothing but this server."""
        take_in_orphans(besides=(self._process.pid, self._front.pid, self._guardian.pid))

    def is_ready(self) -> bool:
        return answers(f"{self.http_url}/v2/health/ready")

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        try:
            text = self.log_file.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def close(self, exit_timeout_s: float | None = None) -> None:
        """Lets requests in flight end, for a time, then ends every process of the server. No signal interrupts it."""
        with _signals_ignored():
            started = set[int]()
            if hasattr(self, "_process"):
                started = descendants(self._process.pid)
                if self._process.poll() is None and exit_timeout_s is None:
                    self._drain()
                if self._process.poll() is None:
                    self._process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(TRITON_EXIT_S + 15.0 if exit_timeout_s is None else exit_timeout_s)
                started |= descendants(self._process.pid)
                if self._process.poll() is None:
                    self._process.kill()
                    self._process.wait()
            self._belongings.sweep(besides=frozenset(started))
            if hasattr(self, "_front"):
                self._front.wait()
            self._guardian.dismiss()

    def _drain(self) -> None:
        """Lets requests in flight end, and ends those that take too long; new ones are refused meanwhile."""
        order = DrainOrder(self._belongings.folder)
        for what, wait_s in ((WAIT, float(self.options.exit_timeout_s)), (END, ENDING_S)):
            order.give(what)
            give_up = time.monotonic() + wait_s
            while order.num_left() and time.monotonic() < give_up and self._process.poll() is None:
                time.sleep(0.05)
        time.sleep(LAST_PIECES_S)

    def _start(self, repository: Path, binary: ServerBinary) -> None:
        backends = binary.arguments(Path(tempfile.mkdtemp(dir=self._belongings.folder)))
        self._start_front()
        for attempt in range(1, START_ATTEMPTS + 1):
            self.grpc_port = free_port(self.options.host, self.options.grpc_port)
            self._launch(repository, binary, backends)
            if self._wait_until_ready():
                return
            if self.options.grpc_port or not self._port_was_taken() or attempt == START_ATTEMPTS:
                raise ServingError(f"tritonserver ended with {self._process.returncode}; {self._explanation()}")

    def _start_front(self) -> None:
        """It listens where clients come; Triton's own HTTP services are on private sockets."""
        options = self.options
        with contextlib.ExitStack() as stack, self.log_file.open("ab") as log:
            http = stack.enter_context(listen(options.host, options.http_port))
            metrics = stack.enter_context(listen(options.host, options.metrics_port))
            self.http_port, self.metrics_port = http.getsockname()[1], metrics.getsockname()[1]
            if options.has_own_metrics:
                metrics.close()
            descriptors = [listener.fileno() for listener in (http, metrics) if listener.fileno() >= 0]
            self._front = subprocess.Popen(
                [sys.executable, "-m", "pt_trtllm.serving.front", str(self._belongings.folder),
                 str(int(options.has_own_model_control)), *map(str, descriptors)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self._belongings.environment(),
                start_new_session=True, pass_fds=descriptors, umask=PRIVATE_UMASK, preexec_fn=end_with_parent,
            )  # fmt: skip

    def _launch(self, repository: Path, binary: ServerBinary, backends: list[str]) -> None:
        for name in (HTTP_SOCKET, METRICS_SOCKET):  # of an attempt before
            (self._belongings.folder / name).unlink(missing_ok=True)
        command = self.options.command(repository, binary, self._belongings, self.grpc_port)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    [command[0], *backends, *command[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=binary.environment() | self._belongings.environment(),
                    start_new_session=True, umask=PRIVATE_UMASK, preexec_fn=confine_server,
                )  # fmt: skip
            except subprocess.SubprocessError:
                raise ServingError(
                    "this kernel or container refuses seccomp filters, without which other users could read the "
                    "server's shared memory; allow prctl(PR_SET_SECCOMP)"
                ) from None

    def _wait_until_ready(self) -> bool:
        """False when the server has ended."""
        give_up = time.monotonic() + self.options.load_timeout_s
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                return False
            if self._front.poll() is not None:
                raise ServingError(f"the HTTP front ended with {self._front.returncode}; {self._explanation()}")
            if self.is_ready() and self._has_metrics():
                return True
            time.sleep(0.1)
        raise ServingError(f"tritonserver was not ready after {self.options.load_timeout_s:g} s; {self._explanation()}")

    def _has_metrics(self) -> bool:
        """The server opens this port last: ready without it, it may be about to end."""
        return self.options.has_own_metrics or answers(self.metrics_url)

    def _port_was_taken(self) -> bool:
        """Each of the server's services says so in the same words. All attempts write to one log."""
        with contextlib.suppress(OSError), self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return re.search(rb"Socket '\S+' already in use", log.read()) is not None
        return False

    def _explanation(self) -> str:
        """Why a model could not be loaded, or the log's end."""
        reasons = [
            line.partition('"')[2] or line
            for line in self.log_tail(400).splitlines()
            if line.startswith("E") and "failed to load" in line
        ]
        return f"its log says: {reasons[0]}" if reasons else f"last lines of its log:\n{self.log_tail()}"

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Those that would end this process; only its main thread may say so, and only there do they interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
