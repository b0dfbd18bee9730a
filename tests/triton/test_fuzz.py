"""Whatever is sent, the server answers: with tokens, or with an error of Triton's. It never hangs and never dies."""

from __future__ import annotations

import json
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pt_trtllm import SamplingParams
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.serving.tensors import CORE_INPUTS, CORE_PRIVATE_INPUTS, ENSEMBLE_INPUTS, Tensor
from pt_trtllm.testing.triton import post, wait_until_quiet

pytestmark = pytest.mark.triton

BATCH, EXAMPLES = 10, 100
"""Requests of an example, and examples. Larger ones are more random choices than Hypothesis makes for one: it would
throw most of them away."""
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
WHOLE = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1), "UINT8": (0, 255)}
NUMPY = {
    "INT32": np.int32,
    "UINT64": np.uint64,
    "UINT8": np.uint8,
    "FP32": np.float32,
    "FP16": np.float16,
    "BOOL": np.bool_,
}

odd_values = st.sampled_from([0, 1, -1, 2, 0.5, 1e38, "", "json", [[]], {}])
short_lists = st.lists(st.integers(-5, 5), max_size=3) | st.lists(st.text(max_size=3), max_size=3)
numbers = st.integers(-(2**40), 2**65) | st.floats()
values_of_json = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), short_lists, odd_values)
some_text = st.one_of(
    st.text(max_size=30), st.sampled_from(["It is", "x" * 5000, "\u0000", "\U0001f600", "<0xE2>", " "])
)
http_bodies = st.one_of(
    st.builds(
        lambda text, count, rest, more: {"text_input": text, "max_tokens": count, **rest, "parameters": more},
        some_text,
        st.one_of(st.integers(1, 6), values_of_json),
        st.dictionaries(st.sampled_from([t.name for t in ENSEMBLE_INPUTS]), values_of_json, max_size=3),
        st.dictionaries(st.text(max_size=5), st.integers(), max_size=1),
    ),
    values_of_json,
    st.binary(max_size=40),
)


@st.composite
def tensor(draw: st.DrawFn, declared: Tensor) -> tuple[str, str, Any]:
    """(name, type, array) that the declaration allows in shape more often than not."""
    batch = draw(st.sampled_from([1, 1, 1, 1, 2, 0]))
    dims = [draw(st.integers(0, 4)) if size == -1 else size for size in declared.dims]
    shape = draw(st.sampled_from([[batch, *dims]] * 6 + [dims, [batch, *dims, 1]]))
    size = int(np.prod(shape))
    if declared.dtype == "STRING":
        texts = draw(st.lists(st.binary(max_size=6) | some_text.map(str.encode), min_size=size, max_size=size))
        return declared.name, "BYTES", np.array(texts, dtype=np.object_).reshape(shape)
    if declared.dtype == "BOOL":
        elements: Any = st.booleans()
    elif declared.dtype in WHOLE:
        low, high = WHOLE[declared.dtype]
        elements = st.integers(max(low, -3), 9) | st.sampled_from([low, high, 1 << 20 if high > 255 else 7])
    else:
        elements = st.floats(width=16) | st.sampled_from([0.0, 0.5, 1.0, float("nan"), float("inf"), -1.0])
    data = draw(st.lists(elements, min_size=size, max_size=size))
    return declared.name, declared.dtype, np.array(data, dtype=NUMPY[declared.dtype]).reshape(shape)


@st.composite
def grpc_request(draw: st.DrawFn) -> tuple[str, list[tuple[str, str, Any]], str]:
    model, declared = draw(
        st.sampled_from([
            ("ensemble", ENSEMBLE_INPUTS),
            ("tensorrt_llm_bls", ENSEMBLE_INPUTS),
            ("tensorrt_llm", (*CORE_INPUTS, *CORE_PRIVATE_INPUTS)),
        ])
    )  # fmt: skip
    tensors = {entry.name: draw(tensor(entry)) for entry in draw(st.lists(st.sampled_from(declared), max_size=4))}
    if draw(st.integers(0, 9)):  # mostly with what is required, and sound
        sound: list[tuple[str, str, Any]] = [
            ("text_input", "BYTES", np.array([[b"It is"]], dtype=np.object_)),
            ("max_tokens", "INT32", np.array([[draw(st.integers(1, 5))]], np.int32)),
        ]
        if model == "tensorrt_llm":
            sound = [
                ("input_ids", "INT32", np.array([[1, 5, 9]], np.int32)),
                ("input_lengths", "INT32", np.array([[draw(st.integers(1, 4))]], np.int32)),
                ("request_output_len", "INT32", np.array([[draw(st.integers(1, 5))]], np.int32)),
            ]
        tensors |= {name: (name, kind, data) for name, kind, data in sound}
    return model, list(tensors.values()), draw(st.text(st.characters(codec="ascii"), max_size=4))


@FUZZ
@given(bodies=st.lists(http_bodies, min_size=BATCH, max_size=BATCH), whole=st.booleans())
def test_http_bodies(server: TritonServer, bodies: list[Any], whole: bool) -> None:
    def send(body: Any) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return post(f"{server.http_url}/v2/models/ensemble/generate{'' if whole else '_stream'}", data)

    with ThreadPoolExecutor(16) as pool:
        for body, (status, text) in zip(bodies, pool.map(send, bodies), strict=True):
            assert status in (200, 400, 500, 503), (body, status, text)
            assert "text_output" in text or "error" in text, (body, status, text)
    assert server.poll() is None, server.log_tail(40)


@FUZZ
@given(requests=st.lists(grpc_request(), min_size=BATCH, max_size=BATCH))
def test_grpc_tensors(server: TritonServer, requests: list[Any]) -> None:
    events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: events.put((result, error)))
        for model, tensors, request_id in requests:
            inputs = []
            for name, kind, data in tensors:
                inputs.append(triton.InferInput(name, list(data.shape), kind))
                inputs[-1].set_data_from_numpy(data)
            client.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)
        ended = 0
        while ended < len(requests):
            result, error = events.get(timeout=240)
            ended += error is not None or result.get_response().parameters["triton_final_response"].bool_param
    assert server.poll() is None, server.log_tail(40)


def test_afterwards_nothing_is_left_and_answers_are_right(server: TritonServer, llm: Any) -> None:
    wait_until_quiet(server, "what was fuzzed has ended")
    expected = llm.generate("It is a truth", SamplingParams(max_tokens=12))[0].outputs[0].text
    with Client(server.grpc_url) as client:
        assert client.generate("It is a truth", SamplingParams(max_tokens=12)).text == expected
