"""What `serve` can be told, and tritonserver's command line made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm.config import problems_to_error
from pt_trtllm.errors import ConfigError
from pt_trtllm.serving.belongings import Belongings
from pt_trtllm.serving.control import HTTP_SOCKET, METRICS_SOCKET
from pt_trtllm.serving.tritonserver import ServerBinary

TRITON_EXIT_S = 10
"""Triton's own time for models to be unloaded, once nothing is running."""
METRICS_PLACE = ("--allow-metrics", "--metrics-address", "--metrics-port")
HTTP_PLACE = ("--allow-http", "--http-address", "--http-port", "--reuse-http-port")
CLOSED_TO_CLIENTS = ("model-repository", "shared-memory", "trace", "logging")
"""By these, clients change the server, run code in it, or read and write memory through it."""
NO_HEADER = "Closed=to-all"
"""Names of HTTP/2 headers have no capitals: the header that would open them cannot be sent, so it is no secret."""


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
        problems += [
            f"{argument!r}: Triton's own HTTP port is private; give --host and --http-port before the --"
            for argument in self.extra
            if argument.startswith(HTTP_PLACE)
        ]
        problems_to_error("server options", problems)

    @property
    def has_own_metrics(self) -> bool:
        """Whether the user says where Triton's metrics are, or that there are none."""
        return any(argument.startswith(METRICS_PLACE) for argument in self.extra)

    @property
    def has_own_model_control(self) -> bool:
        return any(argument.startswith("--model-control-mode") for argument in self.extra)

    def command(self, repository: Path, binary: ServerBinary, belongings: Belongings, grpc_port: int) -> list[str]:
        """The whole command line; every local user can read it, so no secret may stand there."""
        return [
            str(binary.path),
            f"--model-repository={repository}",
            "--disable-auto-complete-config",
            f"--http-address=unix:{belongings.folder / HTTP_SOCKET}", "--http-port=1",
            f"--grpc-address={self.host}", f"--grpc-port={grpc_port}",
            f"--metrics-address=unix:{belongings.folder / METRICS_SOCKET}", "--metrics-port=2",
            f"--exit-timeout-secs={TRITON_EXIT_S}",
            f"--backend-config=python,shm-region-prefix-name={belongings.shm_prefix}",
            *self._model_control(),
            *self._restrictions(),
            *self.extra,
        ]  # fmt: skip

    def _model_control(self) -> Sequence[str]:
        """The core signals the engine's failures through a model it unloads and loads."""
        return () if self.has_own_model_control else ("--model-control-mode=explicit", "--load-model=*")

    def _restrictions(self) -> Sequence[str]:
        """What the user restricts, or opens with a model control mode, stays theirs."""
        arguments = [argument for argument in self.extra if argument.startswith("--grpc-restricted-protocol=")]
        theirs = {name for argument in arguments for name in argument.partition("=")[2].partition(":")[0].split(",")}
        theirs |= {"model-repository"} if self.has_own_model_control else set()
        names = [name for name in CLOSED_TO_CLIENTS if name not in theirs]
        return (f"--grpc-restricted-protocol={','.join(names)}:{NO_HEADER}",) if names else ()


def check_repository(repository: Path) -> Path:
    """The real path of a folder with at least one model."""
    if not repository.is_dir():
        raise ConfigError(f"{repository} is not a folder; expected a model repository written by pt-trtllm deploy")
    if not any(repository.glob("*/config.pbtxt")):
        raise ConfigError(f"{repository} has no model (no */config.pbtxt); write one with pt-trtllm deploy")
    return repository.resolve()
