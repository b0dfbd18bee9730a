"""What breaks is told to those it concerns, at once, and mends itself; a server that ends leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm import SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.processes import command_line, descendants
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.cli import refusal
from pt_trtllm.testing.processes import wait_until_gone
from pt_trtllm.testing.served import served
from pt_trtllm.testing.triton import metric, post, ranks_of, start_server, wait_until

pytestmark = pytest.mark.triton

LONG = SamplingParams(max_tokens=480, ignore_eos=True)
NUM_CLIENTS, ATTEMPTS = 16, 5
LONGEST_S = 240.0
"""Only ends a hang."""
RESTARTING = "the engine is being restarted"


@pytest.fixture(scope="module")
def servers(repository: Path) -> Iterator[list[TritonServer]]:
    """The one that tests of this file hurt, while it runs."""
    running: list[TritonServer] = []
    try:
        yield running
    finally:
        for server in running:
            server.close()


@pytest.fixture
def own_server(repository: Path, servers: list[TritonServer]) -> Iterator[TritonServer]:
    """A server that may be hurt, and ended. The next test gets it when it is well again, or a new one."""
    if not servers:
        servers.append(start_server(repository))
    server = servers[0]
    try:
        yield server
        if server.poll() is None:
            wait_until(lambda: is_well(server), LONGEST_S, "the server is well again")
    finally:
        if server.poll() is not None or not is_well(server):
            servers.remove(server)
            server.close()


def is_well(server: TritonServer) -> bool:
    """Ready, and it answers through all of its models."""
    try:
        with Client(server.grpc_url, model="tensorrt_llm_bls") as client:
            count = SamplingParams(max_tokens=1)
            return server.is_ready() and client.is_ready() and bool(client.generate("It is", count, timeout_s=60))
    except ServingError:
        return False


class Load:
    """Clients that keep asking for long answers, until one fails or the results are wanted; half of them stream."""

    def __init__(self, server: TritonServer, count: int = NUM_CLIENTS) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(count)
        self._streams = {index: threading.Event() for index in range(0, count, 2)}
        """Set when a client's first piece has come."""
        self._last_ask = time.monotonic() + LONGEST_S
        self.answers: list[Future[str]] = [self._pool.submit(self._ask, index) for index in range(count)]
        assert all(started.wait(LONGEST_S) for started in self._streams.values()), "the load did not start"

    def _ask(self, index: int) -> str:
        model = ("ensemble", "tensorrt_llm_bls")[index // 2 % 2]
        reason = "length"
        try:
            with Client(self._server.grpc_url, model=model) as client:
                while reason == "length" and time.monotonic() < self._last_ask:
                    if index not in self._streams:
                        reason = client.generate("It is", LONG).finish_reason
                        continue
                    reason = ""
                    for chunk in client.stream("It is", LONG):
                        self._streams[index].set()
                        reason = chunk.finish_reason or reason
        except ServingError as error:
            return str(error)
        return reason

    def results(self) -> list[str]:
        """How each client's last answer ended."""
        self._last_ask = time.monotonic()
        return [answer.result(LONGEST_S) for answer in self.answers]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self._last_ask = time.monotonic()
        self._pool.shutdown()


def num_restarts(server: TritonServer) -> float:
    return metric(server, "pt_engine_restarts_total")


def wait_until_back(server: TritonServer, restarts: float) -> None:
    """Readiness alone can be that before the failure: a model is unloaded before it is loaded as one that fails."""
    wait_until(lambda: num_restarts(server) > restarts and is_well(server), LONGEST_S, "the engine is back")


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "died without a message"), (signal.SIGSTOP, "was stopped by a signal")]
)
def test_a_lost_rank_fails_what_is_in_flight_and_comes_back(
    own_server: TritonServer, number: signal.Signals, message: str
) -> None:
    restarts = num_restarts(own_server)
    victim = ranks_of(own_server)[1]
    with Load(own_server) as load:
        os.kill(victim, number)
        results = load.results()
    # A client that is late finds a model that asks the engine unloaded: that is how readiness is false.
    told = (message, RESTARTING, "tensorrt_llm_bls")
    assert all(any(text in result for text in told) for result in results if result != "length"), results
    assert any(message in result for result in results), results
    # Who comes late finds the engine back, and can judge no more.
    wait_until(
        lambda: not own_server.is_ready() or num_restarts(own_server) > restarts,
        LONGEST_S,
        "readiness is false meanwhile",
    )
    other = post(f"{own_server.http_url}/v2/models/preprocessing/generate", {"QUERY": "It is", "REQUEST_OUTPUT_LEN": 1})
    assert other[0] == 200, "other models are untouched"
    wait_until_back(own_server, restarts)
    with Client(own_server.grpc_url) as client:
        assert client.generate("It is", SamplingParams(max_tokens=3)).finish_reason == "length"
    assert num_restarts(own_server) == restarts + 1
    wait_until(lambda: not own_server.lost_process(), LONGEST_S, "models that Triton ended itself are not lost")
    wait_until_gone([victim])


def test_requests_during_a_restart_are_refused_at_once(own_server: TritonServer) -> None:
    """Tried again where the restart was over before anybody asked."""
    told = [""]
    for _ in range(ATTEMPTS):
        restarts = num_restarts(own_server)
        os.kill(ranks_of(own_server)[0], signal.SIGKILL)
        with Client(own_server.grpc_url) as client:
            while num_restarts(own_server) == restarts and RESTARTING not in told[-1]:
                told.append(refusal_of(client))
        with Client(own_server.grpc_url, retry_for_s=LONGEST_S) as patient:
            assert patient.generate("It is", SamplingParams(max_tokens=3)).finish_reason == "length"
        wait_until_back(own_server, restarts)
        if RESTARTING in told[-1]:
            return
    pytest.fail(f"nobody was told: {set(told)}")


def refusal_of(client: Client) -> str:
    """Empty where there is an answer."""
    try:
        client.generate("It is", SamplingParams(max_tokens=1))
    except ServingError as error:
        return str(error)
    return ""


def test_a_full_queue_refuses_and_goes_on(own_server: TritonServer) -> None:
    """32 run and 64 wait at most."""
    with ThreadPoolExecutor(100) as pool:
        body = {"text_input": "It is", "max_tokens": 50, "ignore_eos": True}
        url = f"{own_server.http_url}/v2/models/ensemble/generate"
        answers = list(pool.map(lambda _: post(url, body), range(100)))
    refused = [text for status, text in answers if status != 200]
    assert all("Exceeds maximum queue size" in text for text in refused), refused
    with Client(own_server.grpc_url) as client:
        count = SamplingParams(max_tokens=1)
        assert client.generate("It is", count).finish_reason == "length"
        with pytest.raises(ServingError, match="Exceeds maximum queue size"):
            client.generate("It is", SamplingParams(max_tokens=1, n=97, temperature=1.0))
        assert client.generate("It is", count).finish_reason == "length"


def test_a_server_that_hangs_is_left_after_the_timeout(
    own_server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pt_trtllm.serving.client.SERVER_GRACE_S", 1.0)
    with Client(own_server.grpc_url) as client:
        client.generate("It is", SamplingParams(max_tokens=3))  # it knows the model's outputs now
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServingError, match="no word from the server 1 s after the request's own timeout"):
                list(client.stream("It is", LONG, timeout_s=0.5))
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        assert client.generate("It is", SamplingParams(max_tokens=3)).finish_reason == "length"


def test_a_server_told_to_end_lets_streams_end_and_leaves_nothing(repository: Path) -> None:
    with served(repository) as command:
        process, url = command.process, command.grpc_url
        started = descendants(process.pid)
        assert len(started) >= 8, "tritonserver, four models, mpirun and two ranks"
        with Client(url) as client:
            stream = client.stream("It is", LONG)
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            rest = list(stream)
        assert len(first.token_ids) + sum(len(chunk.token_ids) for chunk in rest) == LONG.max_tokens
        assert rest[-1].finish_reason == "length"
        assert process.wait(LONGEST_S) == 0
    wait_until_gone(started)


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "ended with SIGKILL"), (signal.SIGSTOP, "was stopped by a signal")]
)
def test_a_lost_model_ends_the_server(repository: Path, number: signal.Signals, how: str) -> None:
    """Triton 2.51 does not replace it and waits for it: clients must not."""
    with served(repository) as command:
        process, url, out = command.process, command.grpc_url, command.printed
        started = descendants(process.pid)
        with Client(url, model="tensorrt_llm_bls") as client:
            stream = client.stream("It is", LONG)
            next(stream)
            for pid in started:
                if b"tensorrt_llm_bls" in command_line(pid):
                    os.kill(pid, number)
            with pytest.raises(ServingError):
                list(itertools.chain(stream, client.stream("It is", LONG)))  # the first may have come before
        assert process.wait(LONGEST_S) == 1
        # Triton may die of it before it is looked at: it does not always bear the death of what it waits for.
        assert f"{how}, which Triton cannot mend, so the server was ended" in out.read_text() or (
            number == signal.SIGKILL and "tritonserver ended with -" in out.read_text()
        ), out.read_text()
    wait_until_gone(started)


def test_a_server_that_is_killed_leaves_nothing(own_server: TritonServer) -> None:
    with Load(own_server) as load:
        started = descendants(own_server.pid) | {own_server.pid}
        os.kill(own_server.pid, signal.SIGKILL)
        assert all(load.results())
    own_server.close()
    wait_until_gone(started)


def test_a_port_that_is_taken_meanwhile_is_chosen_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are loaded between the choice of the gRPC port and its use; the others are held from the start."""
    shutil.copytree(repository / "preprocessing", tmp_path / "preprocessing")
    launch = TritonServer._launch
    tried: list[int] = []

    def take_and_launch(server: TritonServer, *arguments: Any) -> None:
        tried.append(server.grpc_port)
        if len(tried) == 1:
            other.bind(("127.0.0.1", tried[0]))
        launch(server, *arguments)

    monkeypatch.setattr(TritonServer, "_launch", take_and_launch)
    with socket.socket() as other, start_server(tmp_path) as server:
        assert server.is_ready()
        assert tried == [other.getsockname()[1], server.grpc_port]


def test_a_server_that_cannot_start_says_why(repository: Path, tmp_path: Path) -> None:
    ports = ("--grpc-port", 0, "--http-port", 0, "--metrics-port", 0)
    shutil.copytree(repository, tmp_path / "repository")
    shutil.copytree(repository.parent / "engine", tmp_path / "engine")
    config = tmp_path / "repository/tensorrt_llm/config.pbtxt"
    config.write_text(config.read_text().replace(str(repository.parent / "engine"), str(tmp_path / "engine")))
    damaged = bytearray((tmp_path / "engine/rank1.engine").read_bytes())
    damaged[0:8] = b"\xff" * 8
    (tmp_path / "engine/rank1.engine").write_bytes(damaged)
    line = refusal("serve", "--model-repository", tmp_path / "repository", *ports, code=1)
    assert "rank1.engine" in line
    assert "failed to load 'tensorrt_llm'" in line or "tritonserver ended with" in line
    line = refusal("serve", "--model-repository", tmp_path, *ports)
    assert "has no model" in line
    line = refusal("serve", "--model-repository", repository, "--tritonserver", repository / "manifest.json")
    assert "is not an executable file" in line
    assert json.loads((repository / "manifest.json").read_text())["kind"] == "model repository"
