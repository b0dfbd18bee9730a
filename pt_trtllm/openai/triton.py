"""The engine's model in Triton, over gRPC streaming. Leaving a stream cancels its request in the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import grpc
from tritonclient.grpc import aio, model_config_pb2
from tritonclient.utils import InferenceServerException

from pt_trtllm.openai.errors import FAILED, UNAVAILABLE, ApiError
from pt_trtllm.openai.tensors import Piece, to_inputs, to_piece
from pt_trtllm.serving.addresses import channel_options
from pt_trtllm.serving.error_marks import read_mark
from pt_trtllm.serving.tensors import CORE_PRIVATE_INPUTS, MAX_LENGTH

OUR_OWN = frozenset(tensor.name for tensor in CORE_PRIVATE_INPUTS)
"""Inputs by which a core is known as this project's."""
CONNECT_TIMEOUT_S = 10.0
CHANNEL = [
    ("grpc.max_receive_message_length", -1),  # logits of a long prompt exceed the default of 4 MiB
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class TritonModel:
    def __init__(self, url: str, name: str) -> None:
        """Connects when it is first used, which must be inside the event loop."""
        self.url, self.name = url, name
        self._client = aio.InferenceServerClient(url, channel_args=[*CHANNEL, *channel_options(url)])
        self._config: Any = None

    async def close(self) -> None:
        await self._client.close()

    async def is_ready(self) -> bool:
        """Triton calls our core ready while its engine is down, and then the whole server not ready. Of another core's
        server that would say that any model failed, perhaps one that nobody asks here."""
        try:
            if not await self._client.is_model_ready(self.name, client_timeout=CONNECT_TIMEOUT_S):
                return False
            if OUR_OWN.isdisjoint(await self.inputs()):
                return True
            return bool(await self._client.is_server_ready(client_timeout=CONNECT_TIMEOUT_S))
        except (InferenceServerException, ApiError):
            return False

    async def config(self) -> Any:
        """The model's configuration. Raises when there is no such model, or it takes no token ids."""
        if self._config is None:
            try:
                answer = await self._client.get_model_config(self.name, client_timeout=CONNECT_TIMEOUT_S)
            except InferenceServerException as error:
                raise self._failure(error.message(), error.status()) from None
            names = {tensor.name for tensor in answer.config.input}
            if "input_ids" not in names:
                raise ApiError(
                    f"the server's model {self.name!r} takes {sorted(names)}; expected the core model, with token ids "
                    "as 'input_ids'",
                    status=UNAVAILABLE,
                )
            if not answer.config.model_transaction_policy.decoupled:
                raise ApiError(
                    f"the server's model {self.name!r} is not decoupled, so that it cannot stream; expected one that "
                    "was deployed without --no-decoupled",
                    status=UNAVAILABLE,
                )
            self._config = answer.config
        return self._config

    async def max_length(self) -> int | None:
        """Tokens of prompt and answer together that the engine takes, where the model's configuration says it."""
        text = (await self.config()).parameters[MAX_LENGTH].string_value
        return int(text) if text.isascii() and text.isdecimal() and int(text) else None

    async def inputs(self) -> dict[str, str]:
        """Tensors that the model takes, and their types."""
        config = await self.config()
        return {tensor.name: tensor_type(tensor.data_type) for tensor in config.input}

    async def generate(self, request_id: str, values: Mapping[str, Any]) -> AsyncGenerator[Piece]:
        """Sends one request and gives what it answers, piece by piece."""
        request = {
            "model_name": self.name,
            "inputs": to_inputs(values, await self.inputs(), self.name),
            "request_id": request_id,
        }
        call, failure = self._client.stream_infer(_only(request)), ""
        try:
            async for result, error in call:
                if error is not None:
                    failure = error.message()  # raised behind the end: a stream that is ending is not to be cancelled
                    continue
                piece = to_piece(result)
                if piece.finish_reason == "error":
                    failure = piece.error or "the engine could not go on"
                else:
                    yield piece
        except grpc.aio.AioRpcError as error:
            raise self._failure(error.details() or "", str(error.code())) from None
        finally:
            call.cancel()
        if failure:
            raise self._failure(failure, None)

    def _failure(self, message: str, status: str | None) -> ApiError:
        if status == str(grpc.StatusCode.UNAVAILABLE):
            self._config = None  # what comes back may be another model
            return ApiError(f"no Triton server answers at {self.url}: {message}", status=UNAVAILABLE)
        if status is not None:
            return ApiError(message, status=UNAVAILABLE if "not ready" in message else FAILED)
        return ApiError.of(read_mark(message))


async def _only(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def tensor_type(data_type: int) -> str:
    """TYPE_INT32 of a model's configuration is INT32 in a request, and TYPE_STRING is BYTES."""
    name = str(model_config_pb2.DataType.Name(data_type)).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
