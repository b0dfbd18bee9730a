"""Requests to models of Triton's vLLM backend, and their responses: one JSON text instead of a tensor per option."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from pt_trtllm.errors import ServingError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.serving.wire import Chunk, add_input, changed_options, chunk

INPUT = "sampling_parameters"
"""By this input its models are known."""
SAME_NAME = {
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens", "ignore_eos", "stop",
    "include_stop_str_in_output", "stop_token_ids", "bad_words",
}  # fmt: skip
CHOOSING = {"temperature", "top_k", "top_p", "min_p"}
GUIDES = {"guided_json": "json", "guided_regex": "regex", "guided_grammar": "grammar", "guided_choice": "choice"}
NOT_ENDED = "None"
"""What the backend writes as the finish_reason of an answer that goes on."""


def is_vllm(inputs: Collection[str]) -> bool:
    """By the names of a model's inputs."""
    return INPUT in inputs


def vllm_request(
    model: str, prompt: str, params: SamplingParams, *, stream: bool, timeout_s: float | None
) -> pb.ModelInferRequest:
    """The backend neither ends a request after a time, nor streams several samples apart."""
    unknown = sorted(changed_options(params).keys() - SAME_NAME - CHOOSING - GUIDES.keys())
    unknown += [] if timeout_s is None else ["timeout_s"]
    if unknown:
        raise ServingError(f"Triton's vllm backend has nothing for {', '.join(unknown)}; leave it out", kind="invalid")
    request = pb.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, text in (("text_input", prompt), (INPUT, json.dumps(sampling_parameters(params)))):
        add_input(request, name, "BYTES", np.array([text.encode()], np.object_))
    for name, flag in (("stream", stream), ("exclude_input_in_output", True), ("return_finish_reason", True)):
        add_input(request, name, "BOOL", np.array([flag]))
    return request


def sampling_parameters(params: SamplingParams) -> dict[str, Any]:
    """By vLLM's names. What vLLM has other defaults for is always there."""
    changed = changed_options(params)
    values = {name: value for name, value in changed.items() if name in SAME_NAME}
    if params.is_greedy:
        values["temperature"] = 0.0
    else:
        values |= {name: value for name, value in changed.items() if name in CHOOSING}
    if params.guide is not None:
        name, guide = params.guide
        kind = GUIDES[name]
        values["structured_outputs"] = json.dumps({kind: json.loads(guide) if kind in ("json", "choice") else guide})
    return {"max_tokens": params.max_tokens, **values}


def vllm_chunk(response: pb.ModelInferResponse) -> Chunk:
    piece = chunk(response)
    return dataclasses.replace(piece, finish_reason=None) if piece.finish_reason == NOT_ENDED else piece
