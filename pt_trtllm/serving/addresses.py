"""Where servers listen and how this machine reaches them: never through a proxy where both are on it."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import urllib.request

from pt_trtllm.errors import ServingError

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def reachable(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def is_loopback(host: str) -> bool:
    """Whether a host, as a URL has it, can only be this machine."""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def channel_options(url: str) -> tuple[tuple[str, int], ...]:
    """gRPC reads http_proxy by itself, for every address."""
    host = url.rpartition(":")[0] or url
    return (("grpc.enable_http_proxy", 0),) if is_loopback(host) else ()


def answers(url: str) -> bool:
    """Whether a server of this machine says yes. Another program on that port may say anything, or nothing."""
    try:
        with NO_PROXY.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; 0 takes a free port."""
    with contextlib.ExitStack() as undo:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            raise ServingError(f"cannot listen on {host} port {port}: {error.strerror}; choose another port, or 0 for "
                               "a free one") from None  # fmt: skip
        undo.pop_all()
    return listener


def free_port(host: str, port: int) -> int:
    """The port itself if it is free, any free one for 0."""
    with listen(host, port) as listener:
        return int(listener.getsockname()[1])
