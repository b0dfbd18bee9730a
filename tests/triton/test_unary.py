"""Models without streams (`deploy --no-decoupled`): one request, one response, through every door."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from pt_trtllm import LLM, SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.triton import TritonModel
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.repository import DeployOptions, deploy
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.triton import metric, post, server_sent_events, start_server, wait_until_quiet

pytestmark = pytest.mark.triton

PROMPT, OTHER = "It is a truth", "I am"
TEXT_MODELS = ("ensemble", "tensorrt_llm_bls")
LONG, ATTEMPTS = 480, 10
"""Even so long an answer takes less than a second: whoever has to be in time for it tries again."""


@pytest.fixture(scope="module")
def unary(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("unary") / "repository"
    options = DeployOptions(max_queue_size=64, max_tokens_in_paged_kv_cache=8192, decoupled=False)
    deploy(engine_dir, None, repository, options)
    with start_server(repository) as running:
        yield running
        assert running.poll() is None, f"the server died:\n{running.log_tail(40)}"
        assert not [lost for _ in range(2) if (lost := running.lost_process())], running.log_tail(40)


@pytest.fixture(scope="module")
def grpc_client(unary: TritonServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(unary.grpc_url) as running:
        yield running


def inputs(**values: Any) -> list[triton.InferInput]:
    """[prompts, 1] of each: a list has one value per prompt."""
    made = []
    for name, value in values.items():
        column = [[one] for one in (value if isinstance(value, list) else [value])]
        kind = type(column[0][0])
        dtype, triton_type = {
            str: (np.object_, "BYTES"), bool: (np.bool_, "BOOL"), int: (np.int32, "INT32"), float: (np.float32, "FP32"),
        }[kind]  # fmt: skip
        array = np.array([[one.encode()] for (one,) in column] if kind is str else column, dtype)
        made.append(triton.InferInput(name, list(array.shape), triton_type))
        made[-1].set_data_from_numpy(array)
    return made


def question(model: str, llm: LLM, max_tokens: int, *texts: str, **more: Any) -> list[triton.InferInput]:
    """The same for the core, which takes token ids, and for the models that take text."""
    count = len(texts)
    spread = {name: [value] * count for name, value in more.items()}
    if model != "tensorrt_llm":
        return inputs(text_input=list(texts), max_tokens=[max_tokens] * count, **spread)
    (ids,) = (list(result.prompt_token_ids) for result in llm.generate(texts[0], SamplingParams(max_tokens=1)))
    assert count == 1
    tensor = triton.InferInput("input_ids", [1, len(ids)], "INT32")
    tensor.set_data_from_numpy(np.array([ids], np.int32))
    return [tensor, *inputs(input_lengths=len(ids), request_output_len=max_tokens, **spread)]


def text_of(result: triton.InferResult) -> list[str]:
    values = result.as_numpy("text_output")
    values = result.as_numpy("text_piece") if values is None else values
    return [value.decode() for value in values.reshape(-1)]


@pytest.mark.parametrize("model", [*TEXT_MODELS, "tensorrt_llm"])
def test_answers_are_those_of_run(unary: TritonServer, grpc_client: Any, llm: LLM, model: str) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].outputs[0]
    result = grpc_client.infer(model, question(model, llm, 24, PROMPT), request_id="mine")
    assert text_of(result) == [expected.text]
    assert result.as_numpy("output_ids").tolist() == [[list(expected.token_ids)]]
    assert result.as_numpy("finish_reason").tolist() == [[expected.finish_reason.encode()]]
    assert result.get_response().id == "mine"


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_http_infer_and_both_generate_endpoints(unary: TritonServer, llm: LLM, model: str) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=10))[0].outputs[0].text
    url, body = f"{unary.http_url}/v2/models/{model}", {"text_input": PROMPT, "max_tokens": 10}
    tensors = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": [PROMPT]},
        {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [10]},
        {"name": "bad_words", "datatype": "BYTES", "shape": [1, 1], "data": [""]},
        {"name": "stop_words", "datatype": "BYTES", "shape": [1, 1], "data": [""]},
    ]
    status, text = post(f"{url}/infer", {"inputs": tensors})
    assert status == 200, text
    assert {out["name"]: out["data"] for out in json.loads(text)["outputs"]}["text_output"] == [expected]
    status, text = post(f"{url}/generate", body)
    assert (status, json.loads(text)["text_output"]) == (200, expected)
    status, text = post(f"{url}/generate_stream", body)
    assert (status, [event["text_output"] for event in server_sent_events(text)]) == (200, [expected])


@pytest.mark.parametrize("model", [*TEXT_MODELS, "tensorrt_llm"])
def test_clients_at_the_same_time_share_the_batch(unary: TritonServer, llm: LLM, model: str) -> None:
    """Far fewer forward passes than the answers would take one after the other."""
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=LONG, ignore_eos=True))[0].outputs[0]
    count = 4  # what the BLS model answers at a time
    asked = question(model, llm, LONG, PROMPT, ignore_eos=True)

    def passes() -> float:
        wait_until_quiet(unary, "the answers have ended")
        return metric(unary, "nv_trt_llm_general_metrics", "iteration_counter")

    def share() -> bool:
        before, start, found = passes(), threading.Barrier(count), list[Any]()

        def ask() -> None:
            with triton.InferenceServerClient(unary.grpc_url) as own:
                own.is_server_live()
                start.wait()
                found.append(own.infer(model, asked))

        in_threads(*[ask] * count)
        assert [text_of(result) for result in found] == [[expected.text]] * count
        return passes() - before < count * LONG / 2

    assert any(share() for _ in range(ATTEMPTS))


def test_many_clients_of_every_door_get_their_own_answers(unary: TritonServer, llm: LLM) -> None:
    prompts = [f"{PROMPT} {word}" for word in ("of", "that", "the", "and", "is", "not", "in", "a")]
    answers = llm.generate(prompts, SamplingParams(max_tokens=30))
    expected = {prompt: own.outputs[0].text for prompt, own in zip(prompts, answers, strict=True)}
    failures: list[str] = []

    def ask(index: int) -> None:
        with triton.InferenceServerClient(unary.grpc_url) as own:
            for turn in range(4):
                prompt, model = prompts[(index + turn) % len(prompts)], TEXT_MODELS[(index + turn) % 2]
                if turn % 2:
                    found = text_of(own.infer(model, question(model, llm, 30, prompt)))[0]
                else:
                    body = {"text_input": prompt, "max_tokens": 30}
                    found = json.loads(post(f"{unary.http_url}/v2/models/{model}/generate", body)[1])["text_output"]
                if found != expected[prompt]:
                    failures.append(f"{model}: {prompt!r} became {found!r}")

    in_threads(*[lambda index=index: ask(index) for index in range(8)])  # type: ignore[misc]
    assert failures == []
    wait_until_quiet(unary, "nothing is left of the answers")


def in_threads(*work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_prompts_and_samples_come_as_rows_and_columns(
    unary: TritonServer, grpc_client: Any, llm: LLM, model: str
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.8, n=3, seed=5, logprobs=0, stop=(" of", " a"))
    expected = [result.outputs for result in llm.generate([PROMPT, OTHER], params)]
    more = {"temperature": 0.8, "num_return_sequences": 3, "return_log_probs": True, "return_num_output_tokens": True}
    asked = question(model, llm, 8, PROMPT, OTHER, **more)
    for name, values in {
        "seed": np.array([[5], [5]], np.uint64),
        "stop_words": np.array([[b" of", b" a"]] * 2),
    }.items():
        kind = "UINT64" if name == "seed" else "BYTES"
        asked.append(triton.InferInput(name, list(values.shape), kind))
        asked[-1].set_data_from_numpy(values if name == "seed" else values.astype(np.object_))
    result = grpc_client.infer(model, asked)
    assert text_of(result) == [sample.text for samples in expected for sample in samples]
    ids, lengths = result.as_numpy("output_ids"), result.as_numpy("num_output_tokens")
    assert ids.shape == (2, 3, max(len(sample.token_ids) for samples in expected for sample in samples))
    assert [
        [row[:count].tolist() for row, count in zip(*pair, strict=True)] for pair in zip(ids, lengths, strict=True)
    ] == [[list(sample.token_ids) for sample in samples] for samples in expected]
    assert result.as_numpy("finish_reason").tolist() == [
        [sample.finish_reason.encode() for sample in samples] for samples in expected
    ]
    assert result.as_numpy("cum_log_probs").shape == (2, 3)
    assert result.as_numpy("output_log_probs").shape == ids.shape


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"stream": True},
            "is true, but this model gives one response per request: it was deployed with --no-decoupled",
        ),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"text_input": "word " * 600}, "exceeds maximum input length (511)"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"timeout_s": -1.0}, "timeout_s is -1.0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_is_refused_with_a_reason(
    unary: TritonServer, grpc_client: Any, body: Any, message: str
) -> None:
    for model in TEXT_MODELS:
        asked = {"text_input": "x", "max_tokens": 2, **body}
        status, text = post(f"{unary.http_url}/v2/models/{model}/generate", asked)
        assert (status, message in text) == (400, True), text
        with pytest.raises(triton.InferenceServerException) as refusal:
            grpc_client.infer(model, inputs(**asked))
        assert message in str(refusal.value)
        assert "INVALID_ARGUMENT" in str(refusal.value.status())


def test_the_core_refuses_to_stream(grpc_client: Any, llm: LLM) -> None:
    with pytest.raises(triton.InferenceServerException, match=r"stream \(streaming\) is true, .* --no-decoupled"):
        grpc_client.infer("tensorrt_llm", question("tensorrt_llm", llm, 4, PROMPT, streaming=True))
    prompts = [triton.InferInput("input_ids", [2, 1], "INT32")]
    prompts[0].set_data_from_numpy(np.array([[5], [6]], np.int32))
    more = inputs(input_lengths=[1, 1], request_output_len=[4, 4], num_return_sequences=[1, 2], temperature=[1.0, 1.0])
    with pytest.raises(triton.InferenceServerException, match=r"num_return_sequences is \[1, 2\], expected the same"):
        grpc_client.infer("tensorrt_llm", [*prompts, *more])


@pytest.mark.parametrize("model", [*TEXT_MODELS, "tensorrt_llm"])
def test_time_outs_end_an_answer_with_what_there_is(grpc_client: Any, llm: LLM, model: str) -> None:
    asked = question(model, llm, LONG, PROMPT, ignore_eos=True, timeout_s=0.02)
    results = (grpc_client.infer(model, asked) for _ in range(ATTEMPTS))
    assert any(result.as_numpy("finish_reason").item() == b"timeout" for result in results)


def test_a_stop_request_ends_another_one(grpc_client: Any, unary: TritonServer, llm: LLM) -> None:
    def stopped() -> bool:
        found: list[Any] = []
        asked = question("tensorrt_llm", llm, LONG, PROMPT, ignore_eos=True)
        worker = threading.Thread(target=lambda: found.append(grpc_client.infer("tensorrt_llm", asked, request_id="s")))
        worker.start()
        with triton.InferenceServerClient(unary.grpc_url) as other:
            while worker.is_alive():
                stop = question("tensorrt_llm", llm, 1, PROMPT, stop=True)
                assert other.infer("tensorrt_llm", stop, request_id="s").get_response().outputs == []
        worker.join()
        return bool(found[0].as_numpy("finish_reason").item() == b"cancelled")

    assert any(stopped() for _ in range(ATTEMPTS))


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_a_client_that_leaves_frees_its_blocks(unary: TritonServer, grpc_client: Any, llm: LLM, model: str) -> None:
    """Triton 2.51 tells neither an ensemble's steps nor anybody behind HTTP; see docs/serving.md."""
    asked = question(model, llm, LONG, PROMPT, ignore_eos=True)

    def left(after_s: float) -> bool:
        before = metric(unary, "pt_requests_total", "cancelled")
        calls = [grpc_client.async_infer(model, asked, callback=lambda result, error: None) for _ in range(3)]
        time.sleep(after_s)
        for call in calls:
            call.cancel()
        wait_until_quiet(unary, "the requests of a client that has left have ended")
        return metric(unary, "pt_requests_total", "cancelled") > before

    assert any(left(0.1 + 0.05 * attempt) for attempt in range(ATTEMPTS))


def test_our_client_works_as_with_streams(unary: TritonServer, llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=1, n=2, stop=(" of",))
    expected = llm.generate(PROMPT, params)[0].outputs
    plain = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].outputs[0]
    for model in TEXT_MODELS:
        with Client(unary.grpc_url, model=model) as client:
            assert client.generate(PROMPT, SamplingParams(max_tokens=12)).text == plain.text
            (piece,) = client.stream(PROMPT, SamplingParams(max_tokens=12))
            assert (piece.text, piece.token_ids, piece.finish_reason) == (plain.text, plain.token_ids, "length")
            for sample, piece in zip(expected, client.stream(PROMPT, params), strict=True):
                assert (piece.index, piece.text, piece.token_ids, piece.finish_reason) == (
                    sample.index, sample.text, sample.token_ids, sample.finish_reason,
                )  # fmt: skip
                assert len(piece.logprobs or ()) == len(piece.token_ids)
            with pytest.raises(ServingError, match="exceeds maximum input length"):
                client.generate("word " * 600, SamplingParams(max_tokens=1))
    with Client(unary.grpc_url) as client:
        ids = llm.generate([1, 5, 9], SamplingParams(max_tokens=6))[0].outputs[0]
        assert client.generate([1, 5, 9], SamplingParams(max_tokens=6)).token_ids == ids.token_ids


def test_the_command_line_needs_no_other_options(unary: TritonServer, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].outputs[0].text
    done = check_cli("client", "--url", unary.grpc_url, "--prompt", PROMPT, "--max_tokens", 12)
    assert done.stdout == f"{expected}\n"


def test_openais_front_end_says_that_it_needs_streams(unary: TritonServer) -> None:
    async def ask() -> None:
        model = TritonModel(unary.grpc_url, "tensorrt_llm")
        try:
            await model.config()
        finally:
            await model.close()

    with pytest.raises(ApiError, match=r"is not decoupled, .* deployed without --no-decoupled"):
        asyncio.run(ask())
