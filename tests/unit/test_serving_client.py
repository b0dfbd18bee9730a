"""The client against servers that go away at the wrong moment."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the serve extra: pip install '.[serve]'")

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from pt_trtllm import SamplingParams
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.client import Client

pytestmark = pytest.mark.unit


class Leaving(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Sends these outputs, one response each, and is gone."""

    def __init__(self, *responses: dict[str, str]) -> None:
        self.responses = responses

    def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = pb.ModelMetadataResponse(name=request.name)
        for name in ("text_output", "finish_reason"):
            answer.outputs.add(name=name, datatype="BYTES")
        return answer

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = pb.ModelConfigResponse()
        answer.config.model_transaction_policy.decoupled = True
        return answer

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        for values in self.responses:
            message = pb.ModelStreamInferResponse()
            for name, text in values.items():
                message.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
                raw = serialize_byte_tensor(np.array([text.encode()], np.object_)).item()
                message.infer_response.raw_output_contents.append(raw)
            yield message
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def answer_of(*responses: dict[str, str]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Leaving(*responses), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with Client(f"127.0.0.1:{port}") as client:
                return [chunk.text for chunk in client.stream("It is", SamplingParams())]
        finally:
            server.stop(None).wait()


def test_an_answer_that_has_ended_is_whole_though_the_server_went_away() -> None:
    assert answer_of({"text_output": "a "}, {"text_output": "truth", "finish_reason": "stop"}) == ["a ", "truth"]


def test_an_answer_that_has_not_ended_is_an_error() -> None:
    with pytest.raises(ServingError, match="Socket closed") as failure:
        answer_of({"text_output": "a "})
    assert (failure.value.kind, failure.value.was_taken) == ("unavailable", True)


def test_who_reaches_nobody_has_sent_nothing() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServingError, match="no Triton server answers there") as failure:
            Client(f"127.0.0.1:{unused.getsockname()[1]}")
    assert (failure.value.kind, failure.value.was_taken) == ("unavailable", False)
