"""How a front end is run."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path

from pt_trtllm.config import problems_to_error
from pt_trtllm.openai.keys import is_key


@dataclass(frozen=True, kw_only=True)
class FrontEndOptions:
    url: str
    """host:port of Triton's gRPC endpoint."""
    tokenizer_dir: Path
    host: str = "127.0.0.1"
    port: int = 9000
    """0 takes a free one."""
    model_name: str = "tensorrt_llm"
    """The model in Triton: the one that takes token ids."""
    served_model_name: str = ""
    """The name clients ask for; empty takes `model_name`."""
    chat_template: Path | None = None
    """Instead of the tokenizer's own."""
    metrics_url: str = ""
    """Triton's metrics, shown behind the front end's own; empty takes the host of `url` and Triton's default port."""
    shutdown_timeout_s: float = 10.0
    """After SIGTERM: how long answers on their way may take before they are cancelled."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Clients must send one of them; none lets everybody in."""
    allow_no_key: bool = False
    """Listen where others can reach it without asking for a key."""
    tls_cert: Path | None = None
    """A certificate, with those that vouch for it, in PEM; with `tls_key` the front end speaks HTTPS."""
    tls_key: Path | None = None
    max_requests: int = 1024
    """Requests that are answered at a time; more are refused."""

    def __post_init__(self) -> None:
        problems = []
        if not is_address(self.url):
            problems.append(f"url is {self.url!r}, expected HOST:PORT of Triton's gRPC endpoint")
        if not 0 <= self.port < 1 << 16:
            problems.append(f"port is {self.port}, expected 0 to 65535")
        if self.metrics_url and not self.metrics_url.startswith(("http://", "https://")):
            problems.append(f"metrics_url is {self.metrics_url!r}, expected http://HOST:PORT/metrics")
        if self.shutdown_timeout_s < 0:
            problems.append(f"shutdown_timeout_s is {self.shutdown_timeout_s}, expected 0 or more")
        if self.max_requests < 1:
            problems.append(f"max_requests is {self.max_requests}, expected at least 1")
        if (self.tls_cert is None) != (self.tls_key is None):
            problems.append("TLS needs both tls_cert and tls_key")
        if not all(map(is_key, self.api_keys)):
            problems.append("an API key is empty or has characters other than printable ASCII without blanks")
        if not self.api_keys and not self.allow_no_key and not is_loopback(self.host):
            problems.append(
                f"host is {self.host!r}, where others can reach it, and there is no API key; give --api-key-file, or "
                "--allow-no-key if something before it asks for one"
            )
        problems_to_error("front-end options", problems)

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model_name

    @property
    def triton_metrics_url(self) -> str:
        return self.metrics_url or f"http://{self.url.rpartition(':')[0]}:8002/metrics"


def is_address(text: str) -> bool:
    """Whether it is HOST:PORT, without a scheme."""
    host, colon, port = text.rpartition(":")
    return bool(host and "/" not in host and colon and port.isascii() and port.isdecimal() and int(port) < 1 << 16)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. A name must mean nothing else."""
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)}
        return all(ipaddress.ip_address(address).is_loopback for address in found)
    except (OSError, ValueError):
        return False
