"""Many clients at once: each gets its own answer, leavers free what they held, and the counts add up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pt_trtllm import LLM, SamplingParams
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.triton import metric, metrics, post, wait_until, wait_until_quiet

pytestmark = pytest.mark.triton

NUM_REQUESTS, NUM_CLIENTS = 1000, 32
SOON_S = 240.0
LONG, ATTEMPTS = 500, 10
"""Tokens of an answer that is left or stopped, and times to try: now and then it ends by itself before it is told."""


def mixed(count: int, seed: int) -> list[tuple[str, SamplingParams]]:
    rng = random.Random(seed)
    beginnings = ("It is a truth", "She had never been", "The evening was", "My dear")
    return [
        (
            f"{rng.choice(beginnings)} {'very ' * rng.randrange(20)}",
            SamplingParams(
                max_tokens=rng.randrange(1, 40),
                temperature=rng.choice((None, 0.5, 1.2)),
                top_k=rng.choice((None, 5, 40)),
                top_p=rng.choice((None, 0.9)),
                repetition_penalty=rng.choice((1.0, 1.2)),
                seed=index,
                stop=rng.choice(((), (".",), (" the", "zebra"))),
                min_tokens=rng.choice((0, 1)),
            ),
        )
        for index in range(count)
    ]


def test_sixty_four_clients_with_options_of_their_own(server: TritonServer, llm: LLM) -> None:
    jobs = mixed(64, seed=1)
    expected = [r.outputs[0].text for r in llm.generate([prompt for prompt, _ in jobs], [own for _, own in jobs])]
    together = threading.Barrier(len(jobs))

    def ask(job: tuple[int, tuple[str, SamplingParams]]) -> str:
        index, (prompt, params) = job
        with Client(server.grpc_url, model=("ensemble", "tensorrt_llm_bls")[index % 2]) as client:
            together.wait(SOON_S)
            if index % 4 < 2:
                return client.generate(prompt, params).text
            return "".join(chunk.text for chunk in client.stream(prompt, params))

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(ask, enumerate(jobs))) == expected


def test_models_that_ask_other_models_live_on_a_busy_machine(server: TritonServer, llm: LLM) -> None:
    """Threads of Triton's stub come late there: what they let go of must not be Python's last reference."""
    params = SamplingParams(max_tokens=4)
    expected = llm.generate("It is a truth", params)[0].outputs[0].text
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        with Client(server.grpc_url, model="tensorrt_llm_bls") as client:
            for _ in range(150):
                assert client.generate("It is a truth", params, timeout_s=SOON_S).text == expected
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_thousand_requests_a_fifth_of_them_abandoned(server: TritonServer) -> None:
    wait_until_quiet(server, "nothing runs before the test")
    rng = random.Random(2)
    plans = [
        (rng.random() < 0.2, rng.randrange(0, 6), rng.randrange(8, 24), rng.random() < 0.3) for _ in range(NUM_REQUESTS)
    ]
    before = metric(server, "pt_requests_total")
    local = threading.local()
    clients: list[Client] = []

    def ask(plan: tuple[bool, int, int, bool]) -> str:
        leaves, after, count, by_ids = plan
        if not hasattr(local, "client"):
            local.client = Client(server.grpc_url)
            clients.append(local.client)
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        tokens, ends = 0, 0
        for chunk in local.client.stream([1, 5, 9 + count] if by_ids else f"It is {count}", params):
            tokens += len(chunk.token_ids)
            ends += chunk.finish_reason is not None
            if leaves and tokens > after:
                return "left"
        assert (tokens, ends) == (count, 1)
        return "answered"

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        found = Counter(pool.map(ask, plans))
    for client in clients:
        client.close()
    assert found == {"answered": sum(not p[0] for p in plans), "left": sum(p[0] for p in plans)}
    wait_until_quiet(server, "everything that was left behind has ended")
    assert metric(server, "pt_requests_total") - before == NUM_REQUESTS, "each request ends exactly once"


def test_a_client_that_leaves_frees_its_blocks(server: TritonServer) -> None:
    """The core hears of it itself, an ensemble through its last step, the BLS model between two pieces."""
    for model, prompt in (("ensemble", "It is"), ("ensemble", [1, 5, 9]), ("tensorrt_llm_bls", "It is")):
        wait_until_quiet(server, "nothing runs before the test")
        for _ in range(ATTEMPTS):
            total, cancelled = (metric(server, "pt_requests_total", label) for label in (None, "cancelled"))
            with Client(server.grpc_url, model=model) as client:
                next(client.stream(prompt, SamplingParams(max_tokens=LONG, ignore_eos=True)))
            wait_until_quiet(server, f"{model} has ended what its client left")
            assert metric(server, "pt_requests_total") == total + 1
            if metric(server, "pt_requests_total", "cancelled") == cancelled + 1:
                break
        else:
            pytest.fail(f"{model} computes to the end what the client of {prompt!r} left")


def test_a_stop_request_ends_the_stream_of_that_id(server: TritonServer) -> None:
    body = {"text_input": "It is", "max_tokens": LONG, "stream": True, "ignore_eos": True, "id": "to be stopped"}
    url = f"{server.http_url}/v2/models/ensemble/generate_stream"
    stop = {"input_ids": 1, "input_lengths": 1, "request_output_len": 1, "stop": True, "id": "to be stopped"}
    for _ in range(ATTEMPTS):
        with urllib.request.urlopen(
            urllib.request.Request(url, data=json.dumps(body).encode()), timeout=SOON_S
        ) as answer:
            first = answer.readline()  # it runs, unless this is all of it
            post(f"{server.http_url}/v2/models/tensorrt_llm/generate_stream", stop)
            text = (first + answer.read()).decode()
        assert '"error"' not in text
        if '"finish_reason":"cancelled"' in text:
            return
        assert '"finish_reason":"length"' in text
    pytest.fail("no answer was stopped")


def test_the_families_that_dashboards_know_are_published(server: TritonServer, client: Client) -> None:
    client.generate("It is", SamplingParams(max_tokens=5))
    wait_until(lambda: metric(server, "nv_trt_llm_general_metrics", "iteration_counter") > 0, SOON_S, "they are set")
    names = {name.partition("{")[0] for name in metrics(server)}
    assert {
        "nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics", "nv_trt_llm_inflight_batcher_metrics",
        "nv_trt_llm_general_metrics", "nv_llm_input_token_len_bucket", "nv_llm_output_token_len_bucket",
        "pt_time_to_first_token_seconds_bucket", "pt_time_per_output_token_seconds_bucket", "pt_request_seconds_bucket",
        "pt_tokens_total", "pt_sync_points_total", "pt_requests_total", "pt_engine_restarts_total",
        "nv_inference_request_success",
    } <= names  # fmt: skip
    samples: dict[str, Any] = metrics(server)
    assert any('kv_cache_block_type="max",model="tensorrt_llm",version="1"' in name for name in samples), samples.keys()


def test_the_log_has_a_line_of_json_for_each_answer(server: TritonServer) -> None:
    post(f"{server.http_url}/v2/models/ensemble/generate", {"text_input": "It is", "max_tokens": 3, "id": "looked for"})

    def line() -> str:
        return next((line for line in server.log_tail(400).splitlines() if '\\"looked for\\"' in line), "")

    wait_until(lambda: bool(line()), SOON_S, "the log has the request's id")
    assert '\\"output_tokens\\": 3' in line()
