"""The front end's health is that of the engine, not only of the server before it."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request

import pytest

from pt_trtllm.serving.client import Client
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.front_end import FrontEnd
from pt_trtllm.testing.triton import metric, ranks_of, wait_until

pytestmark = pytest.mark.triton

WAIT_S, ATTEMPTS = 120.0, 5


def status(front: FrontEnd, path: str) -> int:
    try:
        with urllib.request.urlopen(front.address + path, timeout=WAIT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_health_is_503_while_the_engine_is_down(openai_front_end: FrontEnd, server: TritonServer) -> None:
    """Tried again where the restart was over before anybody asked."""
    assert any(is_told(openai_front_end, server) for _ in range(ATTEMPTS)), "nobody was told that it is down"


def is_told(openai_front_end: FrontEnd, server: TritonServer) -> bool:
    restarts = metric(server, "pt_engine_restarts_total")
    assert status(openai_front_end, "/health") == 200
    os.kill(ranks_of(server)[1], signal.SIGKILL)
    try:
        while (told := status(openai_front_end, "/health")) == 200:
            if metric(server, "pt_engine_restarts_total") > restarts:
                return False
        assert told == 503
        assert status(openai_front_end, "/health/live") == 200
        return True
    finally:  # others use this server, too
        with Client(server.grpc_url, model="tensorrt_llm_bls") as client:
            wait_until(
                lambda: metric(server, "pt_engine_restarts_total") > restarts and client.is_ready(),
                WAIT_S,
                "it is back",
            )
            wait_until(lambda: status(openai_front_end, "/health/ready") == 200, WAIT_S, "the front end says so")
