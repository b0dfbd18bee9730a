"""tritonserver as a supervised child: started, waited for, explained when it fails, ended with all it started."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm import env
from pt_trtllm.config import problems_to_error
from pt_trtllm.errors import ConfigError, ServingError
from pt_trtllm.processes import command_line, dead_children, descendants, end_processes
from pt_trtllm.serving.control import CONTROL_HEADER, END, WAIT, DrainOrder
from pt_trtllm.serving.tritonserver import ServerBinary, find_tritonserver

LOG_TAIL_LINES = 15
ENDING_S = 3.0
"""For requests that did not end in time to be ended."""
LAST_PIECES_S = 0.3
"""For what the cores have sent to reach the clients."""
TRITON_EXIT_S = 10
"""Triton's own time for models to be unloaded, once nothing is running."""
START_ATTEMPTS = 3
"""A port that was free a moment ago can be taken by another process."""
METRICS_PLACE = ("--allow-metrics", "--metrics-address", "--metrics-port")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    """0 chooses a free one; so for the others."""
    http_port: int = 8000
    metrics_port: int = 8002
    tritonserver: Path | None = None
    load_timeout_s: float = 900.0
    exit_timeout_s: int = 30
    """For requests in flight to end, when the server is stopped."""
    log_file: Path | None = None
    extra: tuple[str, ...] = ()
    """Further options of tritonserver: TLS, metrics, tracing."""

    def __post_init__(self) -> None:
        ports = {"grpc_port": self.grpc_port, "http_port": self.http_port, "metrics_port": self.metrics_port}
        problems = [f"{name} is {port}, expected 0 to 65535" for name, port in ports.items() if not 0 <= port < 65536]
        given = [port for port in ports.values() if port]
        if len(set(given)) < len(given):
            problems.append(f"ports {given} are not all different")
        problems += [
            f"{argument!r} is not an option; tritonserver's look like --name=value"
            for argument in self.extra
            if not argument.startswith("--")
        ]
        problems_to_error("server options", problems)


class TritonServer:
    """A running server. Close it, or use it in a `with` block; then nothing of it is left."""

    def __init__(self, repository: Path, options: ServerOptions | None = None) -> None:
        """Returns when every model is ready; raises with the server's last lines when that does not happen."""
        self.options = options or ServerOptions()
        repository = check_repository(repository)
        binary = find_tritonserver(self.options.tritonserver)
        self._folder = tempfile.TemporaryDirectory(prefix="pt-triton-")
        self.log_file = self.options.log_file or Path(self._folder.name) / "tritonserver.log"
        # Whatever loses its parent below here comes to this process, which ends it.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._dead: dict[int, str] = {}
        try:
            self._start(repository, binary)
        except BaseException:
            self.close(exit_timeout_s=0.0)
            raise

    @property
    def grpc_url(self) -> str:
        return f"{_reachable(self.options.host)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{_reachable(self.options.host)}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.options.host)}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The server's exit code; None while it runs."""
        return self._process.poll()

    def lost_model(self) -> str:
        """How a model's process died; empty while all live. Triton waits for it forever, and so do its clients."""
        now, self._dead = self._dead, dead_children(self._process.pid)
        lasting = sorted(now.items() & self._dead.items())  # one that Triton ends itself is not dead for long
        return f"process {lasting[0][0]} ended with {lasting[0][1]}" if lasting else ""

    def is_ready(self) -> bool:
        return _answers(f"{self.http_url}/v2/health/ready")

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        try:
            text = self.log_file.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def close(self, exit_timeout_s: float | None = None) -> None:
        """Lets requests in flight end, for a time, then ends every process of the server."""
        if hasattr(self, "_process"):
            wait_s = TRITON_EXIT_S + 15.0 if exit_timeout_s is None else exit_timeout_s
            started = descendants(self._process.pid)
            if self._process.poll() is None and exit_timeout_s is None:
                self._drain()
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(wait_s)
            started |= descendants(self._process.pid) | self._orphans()
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            end_processes(started)
        self._folder.cleanup()

    def _orphans(self) -> set[int]:
        """Models of a server that died, with all below them: they have this process as their parent now."""
        models = {
            pid
            for pid in (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
            if self._shm_prefix.encode() in command_line(pid) and pid != self._process.pid
        }
        return models.union(*map(descendants, models))

    def _drain(self) -> None:
        """Lets requests in flight end, and ends those that take too long; new ones are refused meanwhile."""
        order = DrainOrder(Path(self._folder.name))
        for what, wait_s in ((WAIT, float(self.options.exit_timeout_s)), (END, ENDING_S)):
            order.give(what)
            give_up = time.monotonic() + wait_s
            while order.num_left() and time.monotonic() < give_up and self._process.poll() is None:
                time.sleep(0.05)
        time.sleep(LAST_PIECES_S)

    def _start(self, repository: Path, binary: ServerBinary) -> None:
        for attempt in range(1, START_ATTEMPTS + 1):
            self.grpc_port, self.http_port, self.metrics_port = _ports(self.options)
            self._launch(repository, binary)
            if self._wait_until_ready():
                return
            chosen_here = not all((self.options.grpc_port, self.options.http_port, self.options.metrics_port))
            if not (chosen_here and self._port_was_taken() and attempt < START_ATTEMPTS):
                raise ServingError(f"tritonserver ended with {self._process.returncode}; {self._explanation()}")

    def _launch(self, repository: Path, binary: ServerBinary) -> None:
        work = Path(tempfile.mkdtemp(dir=self._folder.name))
        options, key = self.options, secrets.token_hex(16)
        self._shm_prefix = f"pt-{os.getpid()}-{secrets.token_hex(4)}-"
        control = {env.TRITON_CONTROL_DIR.name: self._folder.name}
        control |= {env.TRITON_CONTROL_URL.name: self.http_url, env.TRITON_CONTROL_KEY.name: key}
        command = [
            str(binary.path),
            f"--model-repository={repository}",
            "--disable-auto-complete-config",
            f"--http-address={options.host}", f"--http-port={self.http_port}",
            f"--grpc-address={options.host}", f"--grpc-port={self.grpc_port}",
            f"--metrics-address={options.host}", f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={TRITON_EXIT_S}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            *_model_control(options.extra, key),
            *binary.arguments(work),
            *options.extra,
        ]  # fmt: skip
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=binary.environment() | control,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _wait_until_ready(self) -> bool:
        """False when the server has ended."""
        give_up = time.monotonic() + self.options.load_timeout_s
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                return False
            if self.is_ready() and self._has_metrics():
                return True
            time.sleep(0.1)
        raise ServingError(f"tritonserver was not ready after {self.options.load_timeout_s:g} s; {self._explanation()}")

    def _has_metrics(self) -> bool:
        """The server opens this port last: ready without it, it may be about to end."""
        is_elsewhere = any(argument.startswith(METRICS_PLACE) for argument in self.options.extra)
        return is_elsewhere or _answers(self.metrics_url)

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


def _model_control(extra: Sequence[str], key: str) -> list[str]:
    """The core signals the engine's failures through a model it unloads and loads; nobody else may do that.

    The API that loads models takes files from its callers and runs them: it is locked with a key of this run.
    """
    if any(argument.startswith("--model-control-mode") for argument in extra):
        return []
    lock = f"model-repository:{CONTROL_HEADER}={key}"
    return [
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--http-restricted-api={lock}",
        f"--grpc-restricted-protocol={lock}",
    ]


def check_repository(repository: Path) -> Path:
    """The real path of a folder with at least one model."""
    if not repository.is_dir():
        raise ConfigError(f"{repository} is not a folder; expected a model repository written by pt-trtllm deploy")
    if not any(repository.glob("*/config.pbtxt")):
        raise ConfigError(f"{repository} has no model (no */config.pbtxt); write one with pt-trtllm deploy")
    return repository.resolve()


def _end_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _reachable(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def _answers(url: str) -> bool:
    """Another program on that port may say anything, or nothing."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _ports(options: ServerOptions) -> Sequence[int]:
    """As asked for; free ones for zeros, all different."""
    wanted = (options.grpc_port, options.http_port, options.metrics_port)
    with contextlib.ExitStack() as held:
        ports = []
        for port in wanted:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((options.host, port))
            except OSError as error:
                raise ServingError(f"cannot listen on {options.host} port {port}: {error.strerror}; choose another "
                                   "port, or 0 for a free one") from None  # fmt: skip
            ports.append(int(listener.getsockname()[1]))
    return ports
