"""`vllm serve` itself on two ranks, started, asked and stopped as a user does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).parents[2] / "examples" / "tiny-pt"
COMMAND = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
LONGEST_S = 420.0
"""Only ends a hang."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = {
        "--tensor-parallel-size": 2, "--dtype": "float32", "--max-model-len": 256, "--max-num-seqs": 4,
        "--host": "127.0.0.1", "--port": port, "--kv-cache-memory-bytes": 1 << 26,
    }  # fmt: skip
    words = [*COMMAND, str(MODEL), "--enforce-eager", *(str(word) for pair in options.items() for word in pair)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(server, address, log)
        yield address
        server.send_signal(signal.SIGINT)
        assert server.wait(LONGEST_S) in (0, -signal.SIGINT), log.read_text()[-6000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + LONGEST_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=30):
            return
        in_time = time.monotonic() < deadline
        assert server.poll() is None and in_time, log.read_text(errors="replace")[-6000:]  # noqa: PT018
        time.sleep(0.3)


def _ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=LONGEST_S)


def test_streamed_text_is_the_references(address: str) -> None:
    for case in json.loads((MODEL / "reference.json").read_text())["cases"]:
        body = {
            "model": str(MODEL), "prompt": case["prompt"], "max_tokens": len(case["output_ids"]), "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        with _ask(f"{address}/v1/completions", body) as answer:
            lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.strip()]
        assert lines[-1] == "[DONE]"
        pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
        assert "".join(pieces) == case["text"]
        assert len(pieces) > 5


def test_chat_without_a_template_is_the_clients_error(address: str) -> None:
    body = {"model": str(MODEL), "messages": [{"role": "user", "content": "Good morning"}]}
    with pytest.raises(urllib.error.HTTPError) as raised:
        _ask(f"{address}/v1/chat/completions", body)
    assert raised.value.code == 400
    assert b"chat template" in raised.value.read()
