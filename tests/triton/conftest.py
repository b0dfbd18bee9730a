"""One real Triton server for all tests of this folder, over two MPI ranks, and a front end before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pt_trtllm.serving.server import ServerOptions, TritonServer
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.front_end import FrontEnd, front_end

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    checkpoint, engine, repository = folder / "checkpoint", folder / "engine", folder / "repository"
    split = ("--world-size", "2", "--dtype", "float32")
    check_cli("convert", "--model-dir", EXAMPLE, "--output-dir", checkpoint, *split)
    check_cli("build", "--checkpoint-dir", checkpoint, "--output-dir", engine)
    check_cli("deploy", "--engine-dir", engine, "--tokenizer-dir", EXAMPLE, "--model-repository", repository)
    with TritonServer(repository, ServerOptions(grpc_port=0, http_port=0, metrics_port=0)) as server:
        yield server


@pytest.fixture(scope="session")
def openai_front_end(triton: TritonServer) -> Iterator[FrontEnd]:
    options = ("--url", triton.grpc_url, "--metrics-url", triton.metrics_url, "--tokenizer-dir", EXAMPLE)
    with front_end(*options, "--served-model-name", "tiny-pt") as started:
        yield started
