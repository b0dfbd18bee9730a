"""The served model says what `run` says, through every door and in every form."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from pt_trtllm import LLM, SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.triton import post, server_sent_events

pytestmark = pytest.mark.triton

PROMPT = "It is a truth"
MODELS = ("ensemble", "tensorrt_llm_bls")
LONG, ATTEMPTS = SamplingParams(max_tokens=480, ignore_eos=True), 10
"""Even so long an answer takes less than a second: whoever has to be in time for it tries again."""
OPTIONS = {
    "greedy": SamplingParams(max_tokens=24),
    "sampled": SamplingParams(max_tokens=24, temperature=0.9, top_k=50, top_p=0.95, seed=7),
    "penalised": SamplingParams(max_tokens=24, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "stopped": SamplingParams(max_tokens=24, stop=(" afraid", "not at all a")),
    "stop_kept": SamplingParams(max_tokens=24, stop=("I am sure",), include_stop_str_in_output=True),
    "banned": SamplingParams(max_tokens=24, bad_words=("world", "I")),
    "long_seed": SamplingParams(max_tokens=8, temperature=1.0, seed=2**63 + 5, min_p=0.05),
    "min_tokens": SamplingParams(max_tokens=12, min_tokens=10, stop=(" of",)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_streamed_and_whole_answers_are_those_of_run(server: TritonServer, llm: LLM, model: str, name: str) -> None:
    expected = llm.generate(PROMPT, OPTIONS[name])[0].outputs[0]
    with Client(server.grpc_url, model=model) as client:
        chunks = list(client.stream(PROMPT, OPTIONS[name]))
        whole = client.generate(PROMPT, OPTIONS[name])
    assert (whole.text, whole.token_ids, whole.finish_reason) == (
        expected.text, expected.token_ids, expected.finish_reason,
    )  # fmt: skip
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason


@pytest.mark.parametrize("model", MODELS)
def test_long_answers_come_in_pieces(server: TritonServer, model: str) -> None:
    """Tokens that are ready together travel together: on a busy machine, now and then, all of them."""
    with Client(server.grpc_url, model=model) as client:
        assert any(len(list(client.stream(PROMPT, LONG))) > 1 for _ in range(ATTEMPTS))
    url = f"{server.http_url}/v2/models/{model}/generate_stream"
    body = {"text_input": PROMPT, "max_tokens": LONG.max_tokens, "ignore_eos": True, "stream": True}
    assert any(len(server_sent_events(post(url, body)[1])) > 1 for _ in range(ATTEMPTS))


def test_token_ids_go_to_the_core_alone(client: Client, llm: LLM) -> None:
    expected = llm.generate([1, 5, 9], OPTIONS["sampled"])[0].outputs[0]
    chunks = list(client.stream([1, 5, 9], OPTIONS["sampled"]))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
    assert client.generate([1, 5, 9], OPTIONS["sampled"]).text == expected.text


def test_log_probabilities_and_samples(server: TritonServer, llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=3, logprobs=2, n=3)
    expected = llm.generate(PROMPT, params)[0].outputs
    for model in MODELS:
        found: dict[int, list[Any]] = {0: [], 1: [], 2: []}
        with Client(server.grpc_url, model=model) as client:
            for chunk in client.stream(PROMPT, params):
                found[chunk.index].append(chunk)
        for sample in expected:
            chunks = found[sample.index]
            assert "".join(chunk.text for chunk in chunks) == sample.text
            rows = [row for chunk in chunks for row in chunk.logprobs]
            assert [row[0][0] for row in rows] == list(sample.token_ids)
            assert [row[0][1] for row in rows] == pytest.approx(
                [row[token].logprob for token, row in zip(sample.token_ids, sample.logprobs or (), strict=True)]
            )


@pytest.mark.parametrize("model", MODELS)
def test_http_generate_and_generate_stream(server: TritonServer, llm: LLM, model: str) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=10))[0].outputs[0]
    url = f"{server.http_url}/v2/models/{model}"
    body = {"text_input": PROMPT, "max_tokens": 10, "bad_words": "", "stop_words": [""], "id": "mine"}
    status, text = post(f"{url}/generate", body)
    answer = json.loads(text)
    assert (status, answer["text_output"], answer["id"]) == (200, expected.text, "mine")
    assert answer["output_ids"] == list(expected.token_ids)
    nested = {"text_input": PROMPT, "parameters": {"max_tokens": 10, "temperature": 0, "unknown": 1}, "stream": True}
    events = server_sent_events(post(f"{url}/generate_stream", nested)[1])
    assert "".join(event["text_output"] for event in events) == expected.text
    assert events[-1]["finish_reason"] == "length"
    assert len(events) <= 10  # tokens that are ready together travel together


@pytest.mark.parametrize("model", MODELS)
def test_the_prompt_comes_first_when_it_is_wanted(server: TritonServer, llm: LLM, model: str) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=5))[0]
    url = f"{server.http_url}/v2/models/{model}"
    body = {
        "text_input": PROMPT, "max_tokens": 5, "exclude_input_in_output": False, "return_log_probs": True,
        "return_num_input_tokens": True, "return_num_output_tokens": True,
    }  # fmt: skip
    answer = json.loads(post(f"{url}/generate", body)[1])
    assert answer["text_output"] == PROMPT + (expected.outputs[0].text or "")
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (len(expected.prompt_token_ids), 5)
    assert answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), rel=1e-4)
    events = server_sent_events(post(f"{url}/generate_stream", body | {"stream": True})[1])
    assert "".join(event["text_output"] for event in events) == answer["text_output"]
    assert sum(event["num_output_tokens"] for event in events) == 5


def test_a_request_with_several_prompts_is_answered_one_by_one(server: TritonServer, llm: LLM) -> None:
    prompts = ["It is a truth", "She had never been", "The evening was"]
    expected = [result.outputs[0].text for result in llm.generate(prompts, SamplingParams(max_tokens=6))]
    responses = infer(
        server, "ensemble", text_input=np.array([[p.encode()] for p in prompts], dtype=np.object_),
        max_tokens=np.full((3, 1), 6, np.int32),
    )  # fmt: skip
    found = {int(r.as_numpy("batch_index")[0, 0]): r.as_numpy("text_output") for r in responses}
    assert [found[index][0].decode() for index in range(3)] == expected
    assert all(text.shape == (1,) for text in found.values())


def test_the_published_core_client_works_unchanged(server: TritonServer, llm: LLM) -> None:
    """Exactly the inputs TensorRT-LLM's benchmark client sends; it reads the length from outputs[0].shape[2]."""
    (response,) = infer(
        server, "tensorrt_llm", input_ids=np.array([[1, 5, 9]], np.int32), input_lengths=np.array([[3]], np.int32),
        request_output_len=np.array([[7]], np.int32), end_id=np.array([[-1]], np.int32),
        pad_id=np.array([[0]], np.int32),
    )  # fmt: skip
    first = response.get_response().outputs[0]
    assert (first.name, list(first.shape)) == ("output_ids", [1, 1, 7])
    expected = llm.generate([1, 5, 9], SamplingParams(max_tokens=7, ignore_eos=True))[0].outputs[0]
    assert response.as_numpy("output_ids").reshape(-1).tolist() == list(expected.token_ids)


def test_the_three_steps_by_hand_give_the_ensembles_text(server: TritonServer, client: Client) -> None:
    (made,) = infer(
        server, "preprocessing", QUERY=np.array([[PROMPT.encode()]], dtype=np.object_),
        REQUEST_OUTPUT_LEN=np.array([[9]], np.int32), STOP_WORDS_DICT=np.array([[b"zebra"]], dtype=np.object_),
    )  # fmt: skip
    (core,) = infer(
        server, "tensorrt_llm", input_ids=made.as_numpy("INPUT_ID"), input_lengths=made.as_numpy("REQUEST_INPUT_LEN"),
        request_output_len=made.as_numpy("REQUEST_OUTPUT_LEN"), stop_words_list=made.as_numpy("STOP_WORDS_IDS"),
        end_id=made.as_numpy("OUT_END_ID"), pad_id=made.as_numpy("OUT_PAD_ID"),
    )  # fmt: skip
    (text,) = infer(
        server, "postprocessing", TOKENS_BATCH=core.as_numpy("output_ids"),
        SEQUENCE_LENGTH=core.as_numpy("sequence_length"),
    )  # fmt: skip
    whole = client.generate(PROMPT, SamplingParams(max_tokens=9)).text
    assert text.as_numpy("OUTPUT")[0].decode().strip() == whole.strip()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": -(2**31)}, "expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
        ({"beam_width": 4}, "beam_width is 4, expected 1"),
        ({"text_input": ""}, ""),
        ({"text_input": "word " * 600}, "exceeds maximum input length (511)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 1e-39}, "expected 0.01 to 100"),
        ({"repetition_penalty": 1e30}, "expected 0.01 to 100"),
        ({"stop_words": ["a b c d"] * 65}, "expected at most 64"),
        ({"stop_words": ["long " * 300]}, "expected at most 1024"),
        ({"lora_task_id": 3}, "does not support LoRA"),
        ({"num_return_sequences": 100000}, "expected 1 to 128"),
        ({"timeout_s": -1.0}, "timeout_s is -1.0, expected above 0"),
        ({"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, "expected as many of both"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_values_are_refused_with_a_reason(server: TritonServer, body: dict[str, Any], message: str) -> None:
    for model in MODELS:
        status, text = post(
            f"{server.http_url}/v2/models/{model}/generate", {"text_input": "x", "max_tokens": 2, **body}
        )
        assert (status == 200 and not message) or (status == 400 and message in json.loads(text)["error"]), text


def test_text_that_is_not_utf8_is_refused(server: TritonServer) -> None:
    with pytest.raises(triton.InferenceServerException, match="text_input is not valid UTF-8"):
        infer(
            server, "ensemble", text_input=np.array([[b"\xff\xfe"]], dtype=np.object_),
            max_tokens=np.array([[3]], np.int32),
        )  # fmt: skip


def test_time_outs_and_stop_requests_end_streams_normally(server: TritonServer, client: Client) -> None:
    reasons = (client.generate(PROMPT, LONG, timeout_s=0.02).finish_reason for _ in range(ATTEMPTS))
    assert "timeout" in reasons
    with pytest.raises(ServingError, match="timeout_s"):
        client.generate(PROMPT, LONG, timeout_s=-1.0)
    with pytest.raises(triton.InferenceServerException, match="stop needs the id"):
        stop(server, "")
    stop(server, "nobody has this id")


def test_the_command_line_streams_the_same_text(server: TritonServer, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].outputs[0].text
    for more in ((), ("--no-stream",)):
        done = check_cli("client", "--url", server.grpc_url, "--prompt", PROMPT, "--max_tokens", 12, *more)
        assert done.stdout == f"{expected}\n"


def infer(server: TritonServer, model: str, request_id: str = "", **arrays: Any) -> list[Any]:
    """The responses of one request, by the plain Triton client."""
    import queue

    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    inputs = []
    for name, values in arrays.items():
        kind = {"object": "BYTES", "bool": "BOOL", "float32": "FP32"}.get(values.dtype.name, values.dtype.name.upper())
        inputs.append(triton.InferInput(name, list(values.shape), kind))
        inputs[-1].set_data_from_numpy(values)
    responses = []
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: events.put((result, error)))
        client.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)
        final = False
        while not final:
            result, error = events.get(timeout=240)
            if error is not None:
                raise error
            final = result.get_response().parameters["triton_final_response"].bool_param
            responses += [result] if len(result.get_response().outputs) else []
    return responses


def stop(server: TritonServer, request_id: str) -> None:
    one = np.array([[1]], np.int32)
    responses = infer(
        server, "tensorrt_llm", request_id, input_ids=one, input_lengths=one, request_output_len=one,
        stop=np.array([[True]]),
    )  # fmt: skip
    assert responses == []
