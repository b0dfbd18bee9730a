"""What `serve` gives to nobody but its own user, and what it bears from everybody; one server for all of it.

It was started with proxies in its environment, and is killed at the end.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from pt_trtllm import SamplingParams
from pt_trtllm.processes import command_line
from pt_trtllm.serving.addresses import NO_PROXY
from pt_trtllm.serving.belongings import SHARED_MEMORY, TEMPORARY, Belongings, sweep_crashed
from pt_trtllm.serving.client import Client
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.front_end import front_end
from pt_trtllm.testing.http2 import raw_call
from pt_trtllm.testing.processes import wait_until_gone
from pt_trtllm.testing.served import Served, served
from pt_trtllm.testing.triton import EXAMPLE, wait_until

pytestmark = pytest.mark.triton

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LONG = SamplingParams(max_tokens=480, ignore_eos=True)


class RecordingProxy:
    """Takes connections, remembers them, and answers none."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._record, daemon=True).start()

    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        return dict.fromkeys(PROXIES, url) | {"no_proxy": "", "NO_PROXY": ""}

    def _record(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._listener.accept()[0] as connection:
                    connection.settimeout(10)
                    self.received.append(connection.recv(1000))

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def proxy() -> Iterator[RecordingProxy]:
    running = RecordingProxy()
    yield running
    running.close()


@pytest.fixture(scope="module")
def door(repository: Path, proxy: RecordingProxy) -> Iterator[Served]:
    with served(repository, env=proxy.environment()) as running:
        yield running


def left_of(folder: Path) -> list[Path]:
    return [path for path in (folder, *SHARED_MEMORY.glob(f"{Belongings(folder).shm_prefix}*")) if path.exists()]


def answers(door: Served) -> bool:
    with Client(door.grpc_url) as client:
        return client.generate("It is", SamplingParams(max_tokens=3)).finish_reason == "length"


def test_loopback_goes_through_no_proxy(door: Served, proxy: RecordingProxy) -> None:
    env = proxy.environment()
    told = check_cli("client", "--url", door.grpc_url, "--prompt", "It is", "--max-tokens", 3, env=env)
    assert told.stdout.strip()
    options = ("--url", door.grpc_url, "--metrics-url", door.metrics_url, "--tokenizer-dir", EXAMPLE)
    with front_end(*options, env=env) as running:
        body = json.dumps({"model": "tensorrt_llm", "prompt": "It is", "max_tokens": 3}).encode()
        told_over_http = ask(running.address, "POST", "/v1/completions", body, Content_Type="application/json")
        assert told_over_http[0] == 200, told_over_http
        with NO_PROXY.open(f"{running.address}/metrics", timeout=60) as response:
            assert b"nv_inference_request_success" in response.read()
    assert proxy.received == []


def test_no_other_user_reads_its_files(door: Served) -> None:
    made = left_of(door.folder)
    assert len(made) > 6, "the folder, regions of four models, and Open MPI's segments"
    for path in (*made, *(below for top in (*made[1:], door.folder / TEMPORARY) for below in top.rglob("*"))):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path


CLOSED = {
    "RepositoryIndex": pb.RepositoryIndexRequest(),
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="preprocessing"),
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="preprocessing"),
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(name="x", byte_size=1),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


def test_nobody_changes_the_server_over_grpc(door: Served) -> None:
    with grpc.insecure_channel(door.grpc_url) as channel:
        server = GRPCInferenceServiceStub(channel)
        for name, request in CLOSED.items():
            with pytest.raises(grpc.RpcError) as refusal:
                getattr(server, name)(request, timeout=60)
            assert "restricted" in refusal.value.details(), name
        assert server.ServerReady(pb.ServerReadyRequest()).ready
        assert server.ModelConfig(pb.ModelConfigRequest(name="ensemble")).config.name == "ensemble"
        assert server.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert answers(door)


def test_who_reads_the_command_line_can_do_nothing_with_it(door: Served) -> None:
    """It names a header that no HTTP/2 server takes, not even from a client that sends it."""
    arguments = command_line(door.triton).decode().split("\0")
    (lock,) = (argument for argument in arguments if "restricted" in argument)
    name, _, value = lock.rpartition(":")[2].partition("=")
    for header in {name, name.lower()}:
        for prefix in ("", "triton-grpc-protocol-"):
            answer = raw_call(door.grpc_url, "RepositoryIndex", {prefix + header: value})
            assert b"tensorrt_llm" not in answer
            assert b"restricted" in answer or b"header" in answer, answer
    assert b"restricted" not in raw_call(door.grpc_url, "ServerLive", {}), "the call itself is sound"


@pytest.mark.parametrize(
    "path",
    ["repository/index", "repository/models/preprocessing/load", "repository/models/preprocessing/unload",
     "systemsharedmemory/status", "systemsharedmemory/region/x/register", "cudasharedmemory/status",
     "cudasharedmemory/region/x/register", "logging", "trace/setting", "models/preprocessing/trace/setting"],
)  # fmt: skip
def test_nobody_changes_the_server_over_http(door: Served, path: str) -> None:
    for spelling in (path, f"./{path}", path.replace("/", "//"), path.replace("o", "%6f")):
        for method, body in (("POST", b"{}"), ("GET", None)):
            status, _ = ask(door.http_url, method, f"/v2/{spelling}", body)
            assert status in (403, 404), (method, spelling)
    assert ask(door.http_url, "POST", f"/v2/{path}", b"{}")[0] == 403


def test_http_still_says_what_clients_ask(door: Served) -> None:
    for path in ("", "/health/live", "/health/ready", "/models/ensemble", "/models/ensemble/ready",
                 "/models/ensemble/versions/1/config", "/models/ensemble/stats", "/models/stats"):  # fmt: skip
        assert ask(door.http_url, "GET", f"/v2{path}")[0] == 200, path
    with NO_PROXY.open(door.metrics_url, timeout=60) as response:
        assert b"pt_tokens_total" in response.read()


def ask(
    url: str, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **headers: str
) -> tuple[int, bytes]:
    """The path goes as it is written."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    with contextlib.closing(connection):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names, encode_chunked=True)
        response = connection.getresponse()
        return response.status, response.read()


def tensor(**fields: object) -> bytes:
    whole = {"name": "REQUEST_OUTPUT_LEN", "datatype": "INT32", "data": [1], **fields}
    query = {"name": "QUERY", "datatype": "BYTES", "shape": [1, 1], "data": ["It is"]}
    return json.dumps({"inputs": [query, whole]}).encode()


def test_no_http_request_harms_another(door: Served) -> None:
    """Each of these ended tritonserver 2.51, or filled its memory, where it reached it."""
    generate, infer = "/v2/models/ensemble/generate", "/v2/models/preprocessing/infer"
    prompt = json.dumps({"text_input": "It is", "max_tokens": 2, "bad": " " * 400_000}).encode()
    with Client(door.grpc_url) as client:
        stream = client.stream("It is", LONG)
        pieces = [next(stream)]
        for size in (6 << 20, 64 << 20):
            assert ask(door.http_url, "POST", generate, b" " * size)[0] == 413
            assert (
                ask(door.http_url, "POST", infer, b"{}" + b"\0" * size, Inference_Header_Content_Length="2")[0] == 413
            )
            assert ask(door.http_url, "POST", generate, iter([b" " * (1 << 16)] * (size >> 16)))[0] == 413
            assert ask(door.metrics_url, "POST", "/metrics", b" " * size)[0] == 405
        assert ask(door.http_url, "POST", generate, gzip.compress(b" " * (64 << 20)), Content_Encoding="gzip")[0] == 413
        for deep in (b"[" * 1_000_000, b'{"a":' * 200_000, b"[" * 65 + b"]" * 65):
            assert ask(door.http_url, "POST", generate, deep)[0] == 400
        tiny = (prompt[at : at + 1] for at in range(len(prompt)))
        assert ask(door.http_url, "POST", generate, tiny)[0] in (200, 400)
        for shape in ([1, 1 << 33], [1 << 20, 1 << 40], [0, 1 << 62], [1, -1], [1] * 1000):
            assert ask(door.http_url, "POST", infer, tensor(shape=shape))[0] == 400, shape
        twice = tensor(shape=[1, 1 << 33])[:-1] + b', "inputs": []}'
        assert ask(door.http_url, "POST", infer, twice)[0] == 400
        for length in ("-1", "99999999999999999999", "x"):
            assert ask(door.http_url, "POST", infer, b"{}", Inference_Header_Content_Length=length)[0] == 400
        pieces += list(stream)
    assert pieces[-1].finish_reason == "length"
    assert sum(len(piece.token_ids) for piece in pieces) == LONG.max_tokens
    zipped = gzip.compress(json.dumps({"text_input": "It is", "max_tokens": 2}).encode())
    status, answer = ask(door.http_url, "POST", generate, zipped, Content_Encoding="gzip")
    assert (status, "text_output" in json.loads(answer)) == (200, True)
    binary = tensor(shape=[1, 1], data=None, parameters={"binary_data_size": 4}).replace(b'"data": null, ', b"")
    length = {"Inference_Header_Content_Length": str(len(binary))}
    assert ask(door.http_url, "POST", infer, binary + b"\5\0\0\0", **length)[0] == 200, "binary tensors pass"


@pytest.mark.parametrize("first", ["triton", "serve"])
def test_killed_with_its_server_it_leaves_nothing(repository: Path, door: Served, first: str) -> None:
    """The guardian sweeps; the first is the module's server, and so this is its last test."""
    with contextlib.ExitStack() as stack:
        hurt = door if first == "triton" else stack.enter_context(served(repository))
        folder, started, triton = hurt.folder, hurt.started, hurt.triton
        assert left_of(folder)
        for pid in (triton, hurt.process.pid)[:: 1 if first == "triton" else -1]:
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(started)
        wait_until(lambda: not left_of(folder), 90, "files are gone")


def test_the_next_server_sweeps_what_nobody_could(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guardian, launcher and Triton are killed; a rank that is stopped cannot leave by itself. In a folder of its own,
    where no server that another test starts meanwhile comes first."""
    with tempfile.TemporaryDirectory() as place, served(repository, env={"TMPDIR": place}) as hurt:
        monkeypatch.setattr(tempfile, "tempdir", place)
        folder, started, triton = hurt.folder, hurt.started, hurt.triton
        ranks = [pid for pid in started if b"pt_trtllm.runtime.worker" in command_line(pid)]
        os.kill(ranks[-1], signal.SIGSTOP)
        killed = [hurt.pid_of(b"serving.guardian"), hurt.process.pid, triton]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(killed)  # with the lock that they held
        assert left_of(folder)
        sweep_crashed()
        wait_until_gone(started)
        assert left_of(folder) == []


def test_signals_do_not_interrupt_the_end(repository: Path) -> None:
    with served(repository) as hurt:
        folder, started = hurt.folder, hurt.started
        os.kill(hurt.triton, signal.SIGKILL)

        def has_ended() -> bool:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                with contextlib.suppress(ProcessLookupError):
                    hurt.process.send_signal(number)
            return hurt.process.poll() is not None

        wait_until(has_ended, 120, "serve ended under a rain of signals")
        wait_until_gone(started)
        wait_until(lambda: not left_of(folder), 90, "files are gone")
