"""What goes wrong with a request is its own affair, and every door says of what kind it is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import threading
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from pt_trtllm import SamplingParams
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.repository import DeployOptions
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.serving.tritonserver import embedded_tritonserver, system_tritonserver
from pt_trtllm.testing.front_end import FrontEnd, front_end
from pt_trtllm.testing.triton import (
    EXAMPLE,
    make_repository,
    metric,
    post,
    ranks_of,
    server_sent_events,
    start_server,
    wait_until,
)

pytestmark = pytest.mark.triton

BREAKS_AT_ONCE, BREAKS_LATER = 13, 14
BREAKING_CORE = f"""
import dataclasses

from pt_trtllm.serving.models.call import Call
from pt_trtllm.serving.models.core import CoreModel as TritonPythonModel


def send(self, part, piece, send=Call.send):
    seed = part.answer.request.params.seed
    if seed == {BREAKS_LATER} and self.options.streaming:
        send(self, part, dataclasses.replace(piece, finish_reason=None))
    if seed in ({BREAKS_AT_ONCE}, {BREAKS_LATER}):
        raise RuntimeError("/srv/private is broken")
    send(self, part, piece)


Call.send = send
"""
"""The model as it is, but for requests with one of two seeds."""
MODELS = ("ensemble", "tensorrt_llm_bls")
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
BACK_WITHIN_S = 120.0
ATTEMPTS, RESTARTS = 20, 5


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """It may be hurt, has a KV cache of 8 blocks, and holds 8 requests."""
    if embedded_tritonserver() is None and system_tritonserver() is None:
        pytest.skip("no tritonserver on this machine")
    limits = BuildLimits(max_batch_size=4, max_seq_len=512, max_num_tokens=256)
    options = DeployOptions(max_queue_size=4, max_tokens_in_paged_kv_cache=256, bls_instances=2)
    repository = make_repository(tmp_path_factory.mktemp("kinds"), world_size=1, limits=limits, options=options)
    (repository / "tensorrt_llm/1/model.py").write_text(BREAKING_CORE)
    with start_server(repository) as running:
        yield running
        assert running.poll() is None, running.log_tail(40)


@pytest.fixture(scope="module")
def front(own_server: TritonServer) -> Iterator[FrontEnd]:
    with front_end("--url", own_server.grpc_url, "--tokenizer-dir", EXAMPLE) as running:
        yield running


def failure_of(server: TritonServer, params: SamplingParams, prompt: Any = "It is", model: str = "ensemble") -> Any:
    with Client(server.grpc_url, model=model) as client, pytest.raises(ServingError) as failure:
        list(client.stream(prompt, params))
    check_text(str(failure.value))
    return failure.value


def check_text(text: str) -> None:
    """The mark is for programs, and files and stacks are for the server's own people."""
    for private in ("[error kind", "/srv/", "Traceback", "model.py"):
        assert private not in text


def check_http(server: TritonServer, kind: str, **body: Any) -> None:
    """Triton's own HTTP port has one status for all errors of such models."""
    status, text = post(f"{server.http_url}/v2/models/ensemble/generate", {"text_input": "It is", **body})
    assert status == 400
    assert f"[error kind: {kind}" in text, text


def complete(front: FrontEnd, **body: Any) -> tuple[int, dict[str, Any]]:
    """The front end's status, and the error if there is one."""
    url = f"{front.address}/v1/completions"
    request = urllib.request.Request(
        url, json.dumps({"prompt": "It is", **body}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=BACK_WITHIN_S) as response:
            return response.status, {}
    except urllib.error.HTTPError as error:
        answer: dict[str, Any] = json.loads(error.read())["error"]
        check_text(str(answer))
        return error.code, answer


def test_what_breaks_in_the_models_hands_ends_alone(own_server: TritonServer, front: FrontEnd) -> None:
    with Client(own_server.grpc_url) as other:
        running = other.stream("It is", LONG)
        tokens = len(next(running).token_ids)
        for model, seed in itertools.product(MODELS, (BREAKS_AT_ONCE, BREAKS_LATER)):
            failure = failure_of(own_server, SamplingParams(max_tokens=20, ignore_eos=True, seed=seed), model=model)
            assert (failure.kind, failure.was_taken) == ("failed", True), failure
        assert tokens + sum(len(chunk.token_ids) for chunk in running) == LONG.max_tokens
    check_http(own_server, "failed", max_tokens=20, seed=BREAKS_AT_ONCE)
    assert complete(front, max_tokens=20, seed=BREAKS_AT_ONCE)[0] == 500
    body = {"text_input": "It is", "max_tokens": 20, "seed": BREAKS_LATER, "stream": True}
    status, text = post(f"{own_server.http_url}/v2/models/ensemble/generate_stream", body)
    assert status == 200
    last = server_sent_events(text)[-1]
    assert last["finish_reason"] == "error"
    assert last["error_message"].endswith("[error kind: failed]")
    with Client(own_server.grpc_url) as client:
        assert client.generate("It is", LONG).finish_reason == "length", "slots and blocks are free again"


def test_a_request_beyond_the_whole_cache_is_too_long(own_server: TritonServer, front: FrontEnd) -> None:
    failure = failure_of(own_server, SamplingParams(max_tokens=400))
    assert failure.kind == "too_long"
    assert "the KV cache has 8; ask for fewer tokens" in str(failure)
    assert failure_of(own_server, SamplingParams(max_tokens=1), [1] * 600).kind == "too_long"
    check_http(own_server, "too_long", max_tokens=400)
    for body in ({"max_tokens": 400}, {"max_tokens": 1, "prompt": [1] * 600}):
        status, error = complete(front, **body)
        assert (status, error["code"], error["type"]) == (400, "context_length_exceeded", "invalid_request_error")


def test_a_wrong_request_is_invalid(own_server: TritonServer, front: FrontEnd) -> None:
    failure = failure_of(own_server, SamplingParams(max_tokens=1), [1_000_000])
    assert (failure.kind, failure.was_taken) == ("invalid", True)
    check_http(own_server, "invalid", max_tokens=1, beam_width=2)
    assert complete(front, max_tokens=1, prompt=[1_000_000])[0] == 400


def test_a_full_queue_is_a_429(own_server: TritonServer, front: FrontEnd) -> None:
    many = SamplingParams(max_tokens=1, n=9, temperature=1.0)
    failure = failure_of(own_server, many)
    assert failure.kind == "invalid", "there will never be room for so many: nobody shall wait for it"
    assert "Exceeds maximum queue size: the request asks for 9 answers" in str(failure)
    enough = threading.Event()

    def keep_asking() -> None:
        with Client(own_server.grpc_url, retry_for_s=BACK_WITHIN_S) as client:
            while not enough.is_set():
                client.generate("It is", dataclasses.replace(LONG, n=8, temperature=1.0))

    crowd = threading.Thread(target=keep_asking)
    crowd.start()
    try:
        found: dict[str, Any] = {}

        def is_refused() -> bool:
            nonlocal found
            status, found = complete(front, max_tokens=1)
            return status == 429

        wait_until(is_refused, BACK_WITHIN_S, "the front end was refused")
        assert (found["code"], found["type"]) == ("queue_full", "rate_limit_error")

        def is_full() -> bool:
            with Client(own_server.grpc_url) as client:
                try:
                    client.generate("It is", dataclasses.replace(many, n=8))
                except ServingError as error:
                    return (error.kind, error.was_taken) == ("queue_full", False)
            return False

        wait_until(is_full, BACK_WITHIN_S, "a client was refused")
    finally:
        enough.set()
        crowd.join()


def test_a_lost_engine_is_unavailable(own_server: TritonServer, front: FrontEnd) -> None:
    """Tried again where the engine was back before everybody had asked."""
    for attempts_left in reversed(range(RESTARTS)):
        restarts = metric(own_server, "pt_engine_restarts_total")
        missed: BaseException | None = None
        try:
            lose_the_engine_and_ask_everywhere(own_server, front)
        except (AssertionError, pytest.fail.Exception) as error:
            missed = error
        wait_until_all_answer_again(own_server, restarts)
        if missed is None:
            return
        if not attempts_left:
            raise missed


def wait_until_all_answer_again(server: TritonServer, restarts: float) -> None:
    for model in reversed(MODELS):  # of one that is not loaded meanwhile, the server does not even say what it takes
        with Client(server.grpc_url, model=model, retry_for_s=BACK_WITHIN_S) as patient:
            assert patient.generate("It is", LONG).finish_reason == "length"
    wait_until(lambda: metric(server, "pt_engine_restarts_total") > restarts, BACK_WITHIN_S, "it is counted")


def lose_the_engine_and_ask_everywhere(server: TritonServer, front: FrontEnd) -> None:
    with Client(server.grpc_url) as client:
        stream = client.stream("It is", LONG)
        next(stream)
        os.kill(ranks_of(server)[0], signal.SIGKILL)
        with pytest.raises(ServingError) as failure:
            list(itertools.chain(stream, client.stream("It is", LONG)))  # the first may have come before
        assert failure.value.kind == "unavailable", failure.value
        check_text(str(failure.value))
        assert "its log" not in str(failure.value)
        refused = failure_of(server, SamplingParams(max_tokens=1))
        assert (refused.kind, refused.was_taken) == ("unavailable", False), refused
        check_http(server, "unavailable", max_tokens=1)
        assert complete(front, max_tokens=1)[0] == 503


@pytest.mark.parametrize("model", MODELS)
def test_a_client_that_leaves_takes_no_other_of_the_same_id_along(
    server: TritonServer, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pt_trtllm.serving.client.uuid.uuid4", lambda: types.SimpleNamespace(hex="mine"))
    long = SamplingParams(max_tokens=480, ignore_eos=True)
    for _ in range(ATTEMPTS):
        before = metric(server, "pt_requests_total", "cancelled")
        with Client(server.grpc_url, model=model) as one, Client(server.grpc_url, model=model) as other:
            leaving: Any = one.stream("It is", long)
            staying = other.stream("It is", long)
            next(leaving)
            chunks = [next(staying)]
            leaving.close()
            chunks += staying
        assert chunks[-1].finish_reason == "length"
        assert sum(len(chunk.token_ids) for chunk in chunks) == long.max_tokens
        if metric(server, "pt_requests_total", "cancelled") > before:
            return  # it was heard while the other was being answered
    pytest.fail("no client that left was heard in time")
