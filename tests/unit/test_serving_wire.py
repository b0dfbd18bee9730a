"""What the client sends and reads is Triton's protocol, as NVIDIA's own client writes and reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the serve extra: pip install '.[serve]'")

from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from pt_trtllm import SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.sampling_fields import Given, sampling_params
from pt_trtllm.serving.wire import SENDABLE, Chunk, ask_for, ask_in_one, chunk, core_request, samples, text_request

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
    return response_of(
        **{
            name: np.array([[value.encode()]], np.object_) if isinstance(value, str) else np.array([[value]], np.int32)
            for name, value in tensors.items()
        }
    )


def response_of(**tensors: Any) -> pb.ModelInferResponse:
    made = pb.ModelInferResponse()
    for name, array in tensors.items():
        is_text = array.dtype == np.object_
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


@pytest.mark.parametrize(
    ("params", "kind", "guide"),
    [
        (SamplingParams(guided_json='{"type": "object"}'), b"json_schema", b'{"type": "object"}'),
        (SamplingParams(guided_regex="a+"), b"regex", b"a+"),
        (SamplingParams(guided_grammar='start: "a"'), b"ebnf_grammar", b'start: "a"'),
        (SamplingParams(guided_choice=("yes", "no")), b"choice", b'["yes", "no"]'),
    ],
)
def test_guides_go_as_kind_and_text(params: SamplingParams, kind: bytes, guide: bytes) -> None:
    sent = inputs_of(text_request("ensemble", "x", params, stream=True, timeout_s=None))
    assert (sent["guided_decoding_guide_type"], sent["guided_decoding_guide"]) == ([[kind]], [[guide]])
    assert not [name for name in sent if name.startswith("guided_") and "decoding" not in name]
    back = sampling_params(
        Given(values={"request_output_len": 64}, guide=(kind.decode(), guide.decode())), eos_ids=(), vocab_size=9
    )
    assert back.guide == params.guide


def test_options_by_token_go_to_both_kinds_of_models() -> None:
    params = SamplingParams(stop_token_ids=(3, 4), logit_bias={5: 1.5}, bad_words_ids=((1, 2), (3,)))
    for request in (
        text_request("ensemble", "x", params, stream=True, timeout_s=None),
        core_request("tensorrt_llm", [1], params, stream=True, timeout_s=None),
    ):
        sent = inputs_of(request)
        assert sent["stop_token_ids"] == [[3, 4]]
        assert (sent["logit_bias"], sent["bad_words_ids"]) == ([[b'{"5": 1.5}']], [[b"[[1, 2], [3]]"]])
    with pytest.raises(ServingError, match="no input for prompt_logprobs"):
        text_request("ensemble", "x", SamplingParams(prompt_logprobs=1), stream=True, timeout_s=None)


def test_every_option_can_be_sent_or_is_refused_by_name() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} - SENDABLE == {"max_tokens", "prompt_logprobs"}


def test_models_with_one_response_are_asked_for_all_in_one() -> None:
    params = SamplingParams(n=2, temperature=1.0)
    for request, name in (
        (text_request("ensemble", "x", params, stream=True, timeout_s=None), "stream"),
        (core_request("tensorrt_llm", [1], params, stream=True, timeout_s=None), "streaming"),
    ):
        assert inputs_of(request)[name] == [[True]]
        ask_in_one(request, params)
        sent = inputs_of(request)
        assert (sent[name], sent["return_num_output_tokens"]) == ([[False]], [[True]])
        assert "num_output_tokens" in [output.name for output in request.outputs]


def test_samples_side_by_side_are_read_one_by_one() -> None:
    both = response_of(
        text_output=np.array([b"one", b""], np.object_), output_ids=np.array([[[7, 8, 0], [9, 0, 0]]], np.int32),
        num_output_tokens=np.array([[2, 0]], np.int32), finish_reason=np.array([[b"stop", b"length"]], np.object_),
        logprobs=np.array([[b'[{"7": -1}]', b"[]"]], np.object_),
    )  # fmt: skip
    assert samples(both) == [
        Chunk(text="one", token_ids=(7, 8), index=0, finish_reason="stop", logprobs=({"7": -1},)),
        Chunk(text="", token_ids=(), index=1, finish_reason="length", logprobs=()),
    ]


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
