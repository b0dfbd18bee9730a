"""One real server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the serve extra: pip install '.[serve]'")

from pt_trtllm import LLM
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.repository import DeployOptions
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.serving.tritonserver import embedded_tritonserver, system_tritonserver
from pt_trtllm.testing.front_end import API_KEYS, FrontEnd, front_end
from pt_trtllm.testing.triton import EXAMPLE, make_repository, start_server

LIMITS = BuildLimits(max_batch_size=32, max_seq_len=512, max_num_tokens=256)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example over two ranks."""
    if embedded_tritonserver() is None and system_tritonserver() is None:
        pytest.skip("no tritonserver on this machine")
    folder = tmp_path_factory.mktemp("served")
    options = DeployOptions(max_queue_size=64, max_tokens_in_paged_kv_cache=8192)
    return make_repository(folder, world_size=2, limits=LIMITS, options=options)


@pytest.fixture(scope="session")
def engine_dir(repository: Path) -> Path:
    return repository.parent / "engine"


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    with start_server(repository) as running:
        yield running
        assert running.poll() is None, f"the server died:\n{running.log_tail(40)}"
        assert not [lost for _ in range(2) if (lost := running.lost_process())], running.log_tail(40)


@pytest.fixture
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as running:
        yield running


@pytest.fixture(scope="session")
def llm(engine_dir: Path) -> Iterator[LLM]:
    """The same engine in this process's own world: what `pt-trtllm run` answers with."""
    with LLM(engine_dir) as running:
        yield running


@pytest.fixture(scope="session")
def openai_front_end(server: TritonServer) -> Iterator[FrontEnd]:
    """The OpenAI endpoint before the server."""
    options = ("--url", server.grpc_url, "--metrics-url", server.metrics_url, "--tokenizer-dir", EXAMPLE)
    with front_end(*options, "--served-model-name", "tiny-pt") as running:
        yield running


@pytest.fixture(scope="session")
def locked_front_end(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEnd]:
    """Another one, which asks for one of `API_KEYS`."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(API_KEYS[0])
    file.chmod(0o600)
    options = ("--url", server.grpc_url, "--metrics-url", server.metrics_url, "--tokenizer-dir", EXAMPLE)
    keys = ("--api-key-file", file, "--api-key", API_KEYS[1])
    with front_end(*options, *keys, "--served-model-name", "tiny-pt") as running:
        yield running
