"""A client of a served model: gRPC, streaming, with this project's errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from pt_trtllm.errors import Kind, ServingError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.serving.addresses import channel_options
from pt_trtllm.serving.error_marks import read_mark
from pt_trtllm.serving.vllm_wire import is_vllm, vllm_chunk, vllm_request
from pt_trtllm.serving.wire import Chunk, ask_for, ask_in_one, chunk, core_request, samples, text_request

CORE = "tensorrt_llm"
"""Takes token ids."""
TEXT_MODEL = "ensemble"
SERVER_GRACE_S = 10.0
"""A server ends a request at its timeout, with what it has; one that is this late is lost."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
READY_TIMEOUT_S = 30.0
NO_CONNECTION = "failed to connect to all addresses"
"""How gRPC says that it has sent nothing."""
CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: closing it touches no other client
)


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class Client:
    """Asks a server at HOST:PORT. Close it, or use it in a `with` block. Threads may share it.

    With `retry_for_s`, a request is sent again for so long, and only where it certainly was not taken: the queue was
    full, or the engine was being restarted. Errors have a `kind` (`pt_trtllm.errors`).
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = TEXT_MODEL,
        ssl: bool = False,
        root_certificates: str | None = None,
        connect_timeout_s: float = 10.0,
        retry_for_s: float = 0.0,
    ) -> None:
        """Raises ServingError when no server answers there."""
        self.url, self.model = url, model
        self._retry_for_s = retry_for_s
        self._metadata: dict[str, Any] = {}
        """Of each model that was asked."""
        self._decoupled: dict[str, bool] = {}
        self._channel = _channel(url, ssl, root_certificates)
        self._server = GRPCInferenceServiceStub(self._channel)
        try:
            if not self._server.ServerLive(pb.ServerLiveRequest(), timeout=connect_timeout_s).live:
                raise ServingError(f"{url}: the server is not live")
        except grpc.RpcError as error:
            self.close()
            raise ServingError(
                f"{url}: no Triton server answers there: {error.details()}", kind="unavailable", was_taken=False
            ) from None

    def is_ready(self) -> bool:
        """Whether the model takes requests."""
        try:
            answer = self._server.ModelReady(pb.ModelReadyRequest(name=self.model), timeout=READY_TIMEOUT_S)
            return bool(answer.ready)
        except grpc.RpcError:
            return False

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Completion:
        """The whole answer at once. The server ends it after `timeout_s`, with what there is by then, and its log knows
        it by `request_id`."""
        text, ids, reason = "", tuple[int, ...](), ""
        for piece in self._stream(prompt, params, request_id, stream=False, timeout_s=timeout_s):
            text, ids, reason = text + piece.text, ids + piece.token_ids, piece.finish_reason or reason
        return Completion(text=text, token_ids=ids, finish_reason=reason)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Iterator[Chunk]:
        """The answer piece by piece; leaving the loop early cancels the request. Models that are not decoupled have one
        piece per sample."""
        return self._stream(prompt, params, request_id, stream=True, timeout_s=timeout_s)

    def close(self) -> None:
        self._channel.close()

    def _stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        request_id: str,
        *,
        stream: bool,
        timeout_s: float | None,
    ) -> Iterator[Chunk]:
        params = params or SamplingParams()
        lost_after_s = None if timeout_s is None else timeout_s + SERVER_GRACE_S
        give_up, wait_s = time.monotonic() + self._retry_for_s, FIRST_RETRY_S
        while True:
            try:
                if isinstance(prompt, str):
                    make = vllm_request if self._is_vllm(self.model) else text_request
                    request = make(self.model, prompt, params, stream=stream, timeout_s=timeout_s)
                elif self.model != TEXT_MODEL and self._is_vllm(self.model):
                    raise ServingError("Triton's vllm backend has nothing for token ids; give the text", kind="invalid")
                else:
                    request = core_request(CORE, prompt, params, stream=stream, timeout_s=timeout_s)
                request.id = request_id or uuid.uuid4().hex
                if not self._is_decoupled(request.model_name):
                    ask_in_one(request, params)
                yield from self._attempt(request, params.n, lost_after_s)
                return
            except ServingError as error:
                if error.was_taken or time.monotonic() + wait_s > give_up:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    def _attempt(self, request: pb.ModelInferRequest, num_samples: int, lost_after_s: float | None) -> Iterator[Chunk]:
        ask_for(request, [output.name for output in self._metadata_of(request.model_name).outputs])
        read = self._reader(request.model_name)
        call = self._server.ModelStreamInfer(iter([request]), timeout=lost_after_s)
        failure, has_ended, num_whole = None, False, 0
        try:
            for message in call:
                response = message.infer_response
                has_ended = has_ended or response.parameters["triton_final_response"].bool_param
                try:
                    if message.error_message:
                        raise read_mark(message.error_message).as_error(f"{self.url}: ")
                    for piece in read(response) if response.outputs else ():
                        num_whole += piece.finish_reason is not None
                        yield piece
                except ServingError as error:  # raised behind the end: a stream that is ending is not to be cancelled
                    failure = error
        except grpc.RpcError as error:
            if num_whole == num_samples:
                return  # the server went away between the answer and the stream's own end
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServingError(f"{self.url}: no word from the server {SERVER_GRACE_S:g} s after the request's own "
                                   "timeout; it hangs or cannot be reached") from None  # fmt: skip
            kind: Kind = "unavailable" if error.code() == grpc.StatusCode.UNAVAILABLE else "failed"
            was_taken = NO_CONNECTION not in (error.details() or "")
            raise ServingError(f"{self.url}: {error.details()}", kind=kind, was_taken=was_taken) from None
        finally:
            call.cancel()
        if failure is not None:
            raise failure
        if not has_ended:
            raise ServingError(
                f"{self.url}: the server ended the stream before the answer's end; ask again", kind="unavailable"
            )

    def _reader(self, model: str) -> Callable[[pb.ModelInferResponse], Sequence[Chunk]]:
        """Of its responses."""
        if self._is_vllm(model):
            return lambda response: [vllm_chunk(response)]
        return (lambda response: [chunk(response)]) if self._is_decoupled(model) else samples

    def _is_vllm(self, model: str) -> bool:
        return is_vllm([tensor.name for tensor in self._metadata_of(model).inputs])

    def _metadata_of(self, model: str) -> Any:
        if model not in self._metadata:
            self._metadata[model] = self._ask(self._server.ModelMetadata, pb.ModelMetadataRequest(name=model))
        return self._metadata[model]

    def _is_decoupled(self, model: str) -> bool:
        if model not in self._decoupled:
            answer = self._ask(self._server.ModelConfig, pb.ModelConfigRequest(name=model))
            self._decoupled[model] = answer.config.model_transaction_policy.decoupled
        return self._decoupled[model]

    def _ask(self, method: Any, question: Any) -> Any:
        """What a model is like; asked before a request is sent."""
        try:
            return method(question, timeout=READY_TIMEOUT_S)
        except grpc.RpcError as error:
            told = read_mark(error.details() or "")
            is_away = error.code() == grpc.StatusCode.UNAVAILABLE or told.kind == "unavailable"
            raise ServingError(
                f"{self.url}: {question.name} does not say what it takes and gives: {error.details()}",
                kind="unavailable" if is_away else told.kind,
                was_taken=not is_away,
            ) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _channel(url: str, ssl: bool, root_certificates: str | None) -> Any:
    options = (*CHANNEL, *channel_options(url))
    if not ssl:
        return grpc.insecure_channel(url, options=options)
    try:
        roots = Path(root_certificates).read_bytes() if root_certificates else None
    except OSError as error:
        raise ServingError(f"{root_certificates}: {error.strerror}; expected a file of PEM certificates") from None
    return grpc.secure_channel(url, grpc.ssl_channel_credentials(roots), options=options)
