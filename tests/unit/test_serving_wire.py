"""What the client sends and reads is Triton's protocol, as NVIDIA's own client writes and reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the serve extra: pip install '.[serve]'")

from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from pt_trtllm import SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.wire import Chunk, ask_for, chunk, core_request, text_request

pytestmark = pytest.mark.unit


def inputs_of(request: pb.ModelInferRequest) -> dict[str, Any]:
    values = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            flat = deserialize_bytes_tensor(raw)
        else:
            flat = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))
        values[tensor.name] = flat.reshape(list(tensor.shape)).tolist()
    return values


def response(**tensors: Any) -> pb.ModelInferResponse:
    made = pb.ModelInferResponse()
    for name, value in tensors.items():
        is_text = isinstance(value, str)
        array = np.array([[value.encode()]], np.object_) if is_text else np.array([[value]], np.int32)
        made.outputs.add(name=name, datatype="BYTES" if is_text else "INT32", shape=array.shape)
        made.raw_output_contents.append(serialize_byte_tensor(array).item() if is_text else array.tobytes())
    return made


def test_text_goes_with_the_options_that_were_set() -> None:
    params = SamplingParams(max_tokens=7, temperature=1, seed=2**63 + 5, stop=("ä", "b"), n=2, logprobs=3, top_k=4)
    request = text_request("ensemble", "Grüße", params, stream=True, timeout_s=2)
    assert inputs_of(request) == {
        "text_input": [["Grüße".encode()]], "max_tokens": [[7]], "stream": [[True]],
        "exclude_input_in_output": [[True]], "temperature": [[1.0]],
        "seed": [[2**63 + 5]], "stop_words": [["ä".encode(), b"b"]], "top_k": [[4]],
        "num_return_sequences": [[2]], "num_logprobs": [[3]], "timeout_s": [[2.0]],
    }  # fmt: skip
    kinds = {tensor.name: tensor.datatype for tensor in request.inputs}
    assert (kinds["temperature"], kinds["seed"], kinds["timeout_s"]) == ("FP32", "UINT64", "FP32")
    assert request.parameters["triton_enable_empty_final_response"].bool_param


def test_token_ids_go_by_the_cores_names() -> None:
    request = core_request(
        "tensorrt_llm", [1, 5, 9], SamplingParams(max_tokens=2, top_p=0.5), stream=False, timeout_s=None
    )
    assert inputs_of(request) == {
        "input_ids": [[1, 5, 9]], "input_lengths": [[3]], "request_output_len": [[2]], "streaming": [[False]],
        "exclude_input_in_output": [[True]], "runtime_top_p": [[0.5]],
    }  # fmt: skip


def test_only_what_is_read_and_what_the_model_has_is_asked_for() -> None:
    has = ["text_output", "cum_log_probs", "sequence_index", "logprobs", "finish_reason", "output_ids"]
    plain = text_request("ensemble", "x", SamplingParams(), stream=True, timeout_s=None)
    ask_for(plain, has)
    assert [output.name for output in plain.outputs] == ["text_output", "finish_reason", "output_ids"]
    several = text_request(
        "ensemble", "x", SamplingParams(n=2, logprobs=1, temperature=0.5), stream=True, timeout_s=None
    )
    ask_for(several, has)
    ask_for(several, has)
    assert [output.name for output in several.outputs] == [
        "text_output", "sequence_index", "logprobs", "finish_reason", "output_ids",
    ]  # fmt: skip
    ask_for(several, ["text_output"])
    assert [output.name for output in several.outputs] == ["text_output"]


def test_a_response_is_read_whatever_it_has() -> None:
    assert chunk(response(text_output="é", output_ids=[3, 4], sequence_index=2)) == Chunk(
        text="é", token_ids=(3, 4), index=2
    )
    last = chunk(response(text_piece="", output_ids=5, finish_reason="stop", logprobs='[{"5": -0.5}]'))
    assert (last.text, last.token_ids, last.finish_reason, last.logprobs) == ("", (5,), "stop", ({"5": -0.5},))
    assert chunk(response(text_output="text only")) == Chunk(text="text only", token_ids=())
    with pytest.raises(ServingError, match="a rank died"):
        chunk(response(text_output="", finish_reason="error", error_message="a rank died"))
