"""Requests and responses of Triton's gRPC protocol, as this project's client sends and reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from pt_trtllm.errors import ServingError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.serving.error_marks import read_mark
from pt_trtllm.serving.sampling_fields import GUIDE_TYPES

TENSOR_TYPES = {bool: ("BOOL", "?"), int: ("INT32", "<i4"), float: ("FP32", "<f4")}
FLOATS = {"temperature", "top_p", "runtime_top_p", "min_p", "repetition_penalty", "presence_penalty",
          "frequency_penalty", "timeout_s"}  # fmt: skip
SENDABLE = {
    "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "min_tokens", "ignore_eos", "stop", "include_stop_str_in_output", "bad_words", "logprobs",
    "stop_token_ids", "logit_bias", "bad_words_ids", "guided_json", "guided_regex", "guided_grammar", "guided_choice",
}  # fmt: skip
INPUT_NAMES = {"n": "num_return_sequences", "stop": "stop_words", "logprobs": "num_logprobs"}
CORE_INPUT_NAMES = {"top_k": "runtime_top_k", "top_p": "runtime_top_p"}
GUIDE_KINDS = {option: kind for kind, option in GUIDE_TYPES.items()}
READ = ("text_output", "text_piece", "output_ids", "finish_reason", "error_message")
"""Outputs that are read of every response, where the model has them: each of them costs time per token."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What is new since the last chunk of the same answer."""

    text: str
    token_ids: tuple[int, ...]
    """Empty from a model that sends text only."""
    index: int = 0
    """Of the sample, with n above 1."""
    finish_reason: str | None = None
    """"stop", "length", "cancelled" or "timeout", with the last chunk."""
    logprobs: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)


def text_request(
    model: str, prompt: str, params: SamplingParams, *, stream: bool, timeout_s: float | None
) -> pb.ModelInferRequest:
    """To a model that takes text: the ensemble, or the same chain in Python."""
    values = _values(params, timeout_s)
    values |= {"text_input": [prompt], "max_tokens": params.max_tokens, "stream": stream}
    return _request(model, values, params)


def core_request(
    model: str, prompt: Sequence[int], params: SamplingParams, *, stream: bool, timeout_s: float | None
) -> pb.ModelInferRequest:
    values = {CORE_INPUT_NAMES.get(name, name): value for name, value in _values(params, timeout_s).items()}
    values |= {"input_lengths": len(prompt), "request_output_len": params.max_tokens, "streaming": stream}
    request = _request(model, values, params)
    add_input(request, "input_ids", "INT32", np.array([list(prompt)], "<i4"))
    return request


def ask_for(request: pb.ModelInferRequest, outputs: Sequence[str]) -> None:
    """Of the model's outputs those that `chunk` reads."""
    wanted = {*READ, *(output.name for output in request.outputs)}
    del request.outputs[:]
    for name in outputs:
        if name in wanted:
            request.outputs.add(name=name)


def chunk(response: pb.ModelInferResponse) -> Chunk:
    """Raises what the engine could not go on for."""
    raw = {output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)}
    message = _text(raw.get("error_message"))
    if message:
        raise read_mark(message).as_error()
    rows, ids, index = _text(raw.get("logprobs")), raw.get("output_ids"), raw.get("sequence_index")
    return Chunk(
        text=_text(raw.get("text_output", raw.get("text_piece"))),
        token_ids=() if ids is None else tuple(np.frombuffer(ids, "<i4").tolist()),
        index=int.from_bytes(index, "little") if index else 0,
        finish_reason=_text(raw.get("finish_reason")) or None,
        logprobs=tuple(json.loads(rows)) if rows else None,
    )


def ask_in_one(request: pb.ModelInferRequest, params: SamplingParams) -> None:
    """Changes a request for a model that gives one response: nothing streams, and samples come side by side."""
    for index, tensor in enumerate(request.inputs):
        if tensor.name in ("stream", "streaming"):
            request.raw_input_contents[index] = np.array(False).tobytes()
    if params.n > 1:
        add_input(request, "return_num_output_tokens", *_array("return_num_output_tokens", True))
        request.outputs.add(name="num_output_tokens")


def samples(response: pb.ModelInferResponse) -> list[Chunk]:
    """The whole answers of one response, [1, samples, ...]."""
    raw = {output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)}
    texts = _texts(raw.get("text_output", raw.get("text_piece")))
    reasons, logprobs = _texts(raw.get("finish_reason")), _texts(raw.get("logprobs"))
    ids = np.frombuffer(raw.get("output_ids", b""), "<i4").reshape(len(texts), -1)
    lengths = np.frombuffer(raw["num_output_tokens"], "<i4") if "num_output_tokens" in raw else [ids.shape[1]]
    return [
        Chunk(
            text=text,
            token_ids=tuple(ids[index, : lengths[index]].tolist()),
            index=index,
            finish_reason=reasons[index] if reasons else None,
            logprobs=tuple(json.loads(logprobs[index])) if logprobs else None,
        )
        for index, text in enumerate(texts)
    ]


def changed_options(params: SamplingParams) -> dict[str, Any]:
    """Those that differ from their defaults, but for `max_tokens`, which every server is told."""
    defaults = SamplingParams()
    return {
        field.name: value
        for field in dataclasses.fields(SamplingParams)
        if (value := getattr(params, field.name)) != getattr(defaults, field.name) and field.name != "max_tokens"
    }


def _values(params: SamplingParams, timeout_s: float | None) -> dict[str, Any]:
    """Options that differ from their defaults, by the names of the server's inputs."""
    changed = changed_options(params)
    unknown = sorted(set(changed) - SENDABLE)
    if unknown:
        raise ServingError(f"the server has no input for {', '.join(unknown)}; leave it out")
    values = {INPUT_NAMES.get(name, name): value for name, value in changed.items() if name not in GUIDE_KINDS}
    for name in ("logit_bias", "bad_words_ids"):
        if name in values:
            values[name] = [json.dumps(values[name])]
    if params.guide is not None:
        name, guide = params.guide
        values |= {"guided_decoding_guide_type": [GUIDE_KINDS[name]], "guided_decoding_guide": [guide]}
    return values | {"exclude_input_in_output": True} | ({} if timeout_s is None else {"timeout_s": float(timeout_s)})


def _request(model: str, values: Mapping[str, Any], params: SamplingParams) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in values.items():
        add_input(request, name, *_array(name, value))
    for name, is_wanted in (("sequence_index", params.n > 1), ("logprobs", params.logprobs is not None)):
        if is_wanted:
            request.outputs.add(name=name)
    return request


def _array(name: str, value: Any) -> tuple[str, Any]:
    """(type, values): [1, 1], or [1, n] for lists."""
    if name == "stop_token_ids":
        return "INT32", np.array([value], "<i4")
    if isinstance(value, (list, tuple)):
        return "BYTES", np.array([[text.encode() for text in value]], dtype=np.object_)
    if name == "seed":
        return "UINT64", np.array([[value]], "<u8")
    kind, dtype = TENSOR_TYPES[float if name in FLOATS else type(value)]
    return kind, np.array([[value]], dtype)


def add_input(request: pb.ModelInferRequest, name: str, kind: str, values: Any) -> None:
    """`values` is an array; the tensor has its shape."""
    request.inputs.add(name=name, datatype=kind, shape=values.shape)
    request.raw_input_contents.append(serialize_byte_tensor(values).item() if kind == "BYTES" else values.tobytes())


def _texts(raw: bytes | None) -> list[str]:
    return [value.decode() for value in deserialize_bytes_tensor(raw).tolist()] if raw else []


def _text(raw: bytes | None) -> str:
    """The first string: four bytes of its length, then itself."""
    return raw[4 : 4 + int.from_bytes(raw[:4], "little")].decode() if raw else ""
