"""Helpers for tests and benchmarks that run a real Triton server on a small engine."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.processes import descendants
from pt_trtllm.serving.repository import DeployOptions, deploy
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.serving.server_options import ServerOptions

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"


class RunningServer(Protocol):
    """A running server, whoever keeps it."""

    @property
    def pid(self) -> int: ...

    @property
    def metrics_url(self) -> str: ...


def make_repository(folder: Path, *, world_size: int, limits: BuildLimits, options: DeployOptions) -> Path:
    """The example model, converted, built and deployed; the engine is `folder / "engine"`."""
    convert(EXAMPLE, folder / "checkpoint", ConvertOptions(world_size=world_size, dtype="float32"))
    build(folder / "checkpoint", folder / "engine", BuildOptions(limits=limits))
    deploy(folder / "engine", None, folder / "repository", options)
    return folder / "repository"


def start_server(repository: Path, *extra: str, exit_timeout_s: int = 20) -> TritonServer:
    """On free ports of this host."""
    options = ServerOptions(
        grpc_port=0, http_port=0, metrics_port=0, load_timeout_s=600, exit_timeout_s=exit_timeout_s, extra=extra
    )
    return TritonServer(repository, options)


def post(url: str, body: bytes | dict[str, Any], timeout_s: float = 240.0) -> tuple[int, str]:
    """(status, body) of an HTTP POST, errors included."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=timeout_s) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def server_sent_events(body: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]


def metrics(server: RunningServer) -> dict[str, float]:
    """Every sample of the metrics port, by its name and labels as written there."""
    with urllib.request.urlopen(server.metrics_url, timeout=240) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def metric(server: RunningServer, family: str, label: str | None = None) -> float:
    """The sum of a family's samples; only of those with this label value, where one is given."""
    return sum(
        value
        for name, value in metrics(server).items()
        if name.startswith(f"{family}{{") and (label is None or f'"{label}"' in name)
    )


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def wait_until_quiet(server: RunningServer, what: str, timeout_s: float = 240.0) -> None:
    """Nothing runs, nothing waits, no block of the KV cache is in use: by gauges that were set from now on."""
    asked = time.time()
    zeros = [("nv_trt_llm_request_metrics", label) for label in ("active", "scheduled", "waiting")]
    zeros.append(("nv_trt_llm_kv_cache_block_metrics", "used"))

    def is_quiet() -> bool:
        is_new = metric(server, "nv_trt_llm_general_metrics", "timestamp") > asked + 0.2
        return is_new and all(metric(server, *which) == 0 for which in zeros)

    wait_until(is_quiet, timeout_s, what)


def ranks_of(server: RunningServer) -> dict[int, int]:
    """rank -> pid, of the worlds that this server's own models started."""
    return {rank: pid for pid in descendants(server.pid) for rank in _rank_of(pid)}


def _rank_of(pid: int) -> Iterator[int]:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        world = Path(arguments[arguments.index("pt_trtllm.runtime.worker") + 2])
        for path in world.glob("rank*.status"):
            if json.loads(path.read_text())["pid"] == pid:
                yield int(path.stem.removeprefix("rank"))
    except (OSError, ValueError, IndexError):
        return
