"""A client of a served model: gRPC, streaming, with this project's errors."""

from __future__ import annotations

import dataclasses
import json
import queue
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from pt_trtllm.errors import ServingError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.serving.control import IS_RESTARTED, QUEUE_IS_FULL

SERVER_GRACE_S = 10.0
"""A server ends a request at its timeout, with what it has; one that is this late is lost."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
NOT_TAKEN = (QUEUE_IS_FULL, IS_RESTARTED)
TENSOR_TYPES = {bool: ("BOOL", np.bool_), int: ("INT32", np.int32), float: ("FP32", np.float32)}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What is new since the last chunk of the same answer."""

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    """Of the sample, with n above 1."""
    finish_reason: str | None = None
    """"stop", "length", "cancelled" or "timeout", with the last chunk."""
    logprobs: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class _NotTakenError(ServingError):
    """The server refused a request before anything was done for it."""


class Client:
    """Asks a server at HOST:PORT. Close it, or use it in a `with` block. Threads may share it.

    With `retry_for_s`, a request is sent again for so long, and only where it certainly was not taken: the queue was
    full, or the engine was being restarted.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "ensemble",
        ssl: bool = False,
        root_certificates: str | None = None,
        connect_timeout_s: float = 10.0,
        retry_for_s: float = 0.0,
    ) -> None:
        """Raises ServingError when no server answers there."""
        self.url, self.model = url, model
        self._retry_for_s = retry_for_s
        self._options = {"ssl": ssl, "root_certificates": root_certificates}
        self._client = self._connect()
        try:
            if not self._client.is_server_live(client_timeout=connect_timeout_s):
                raise ServingError(f"{url}: the server is not live")
        except triton.InferenceServerException as error:
            self._client.close()
            raise ServingError(f"{url}: no Triton server answers there: {error.message()}") from None

    def is_ready(self) -> bool:
        """Whether the model takes requests."""
        try:
            return bool(self._client.is_model_ready(self.model, client_timeout=5.0))
        except triton.InferenceServerException:
            return False

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, timeout_s: float | None = None
    ) -> Completion:
        """The whole answer at once. The server ends it after `timeout_s`, with what there is by then."""
        text, ids, reason = "", tuple[int, ...](), ""
        for chunk in self._stream(prompt, params, stream=False, timeout_s=timeout_s):
            text, ids, reason = text + chunk.text, ids + chunk.token_ids, chunk.finish_reason or reason
        return Completion(text=text, token_ids=ids, finish_reason=reason)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, timeout_s: float | None = None
    ) -> Iterator[Chunk]:
        """The answer piece by piece; leaving the loop early cancels the request."""
        return self._stream(prompt, params, stream=True, timeout_s=timeout_s)

    def close(self) -> None:
        self._client.close()

    def _connect(self) -> Any:
        return triton.InferenceServerClient(self.url, **self._options)

    def _stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None, *, stream: bool, timeout_s: float | None
    ) -> Iterator[Chunk]:
        give_up, wait_s = time.monotonic() + self._retry_for_s, FIRST_RETRY_S
        while True:
            try:
                yield from self._attempt(prompt, params, stream=stream, timeout_s=timeout_s)
                return
            except _NotTakenError:
                if time.monotonic() + wait_s > give_up:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    def _attempt(
        self, prompt: str | Sequence[int], params: SamplingParams | None, *, stream: bool, timeout_s: float | None
    ) -> Iterator[Chunk]:
        events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        give_up = None if timeout_s is None else time.monotonic() + timeout_s + SERVER_GRACE_S
        client = self._connect()  # cancelling ends a whole gRPC stream: each request has its own
        ended = False
        try:
            client.start_stream(lambda result, error: events.put((result, error)))
            model, inputs = self._inputs(prompt, params or SamplingParams(), stream, timeout_s)
            client.async_stream_infer(model, inputs, request_id=uuid.uuid4().hex, enable_empty_final_response=True)
            while not ended:
                result, error = self._next(events, give_up)
                if error is not None:
                    ended = True
                    kind = _NotTakenError if any(text in error.message() for text in NOT_TAKEN) else ServingError
                    raise kind(f"{self.url}: {error.message()}")
                response = result.get_response()
                ended = response.parameters["triton_final_response"].bool_param
                if len(response.outputs):
                    yield _chunk(result)
        finally:
            client.stop_stream(cancel_requests=not ended)
            client.close()

    def _next(self, events: queue.SimpleQueue[tuple[Any, Any]], give_up: float | None) -> tuple[Any, Any]:
        try:
            return events.get(timeout=None if give_up is None else max(0.0, give_up - time.monotonic()))
        except queue.Empty:
            raise ServingError(f"{self.url}: no word from the server {SERVER_GRACE_S:g} s after the request's own "
                               "timeout; it hangs or cannot be reached") from None  # fmt: skip

    def _inputs(
        self, prompt: str | Sequence[int], params: SamplingParams, stream: bool, timeout_s: float | None
    ) -> tuple[str, list[Any]]:
        values = _values(params)
        if timeout_s is not None:
            values["timeout_s"] = float(timeout_s)
        if isinstance(prompt, str):
            values |= {"text_input": [prompt], "max_tokens": params.max_tokens, "stream": stream}
            values["exclude_input_in_output"] = True
            return self.model, [_tensor(name, value) for name, value in values.items()]
        names = {"top_k": "runtime_top_k", "top_p": "runtime_top_p"}
        values = {names.get(name, name): value for name, value in values.items()}
        values |= {"input_lengths": len(prompt), "request_output_len": params.max_tokens, "streaming": stream}
        values["exclude_input_in_output"] = True
        ids = triton.InferInput("input_ids", [1, len(prompt)], "INT32")
        ids.set_data_from_numpy(np.array([list(prompt)], np.int32))
        return "tensorrt_llm", [ids, *(_tensor(name, value) for name, value in values.items())]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _values(params: SamplingParams) -> dict[str, Any]:
    """Options that differ from their defaults, by the names of the server's inputs."""
    defaults = SamplingParams()
    changed = {
        field.name: value
        for field in dataclasses.fields(SamplingParams)
        if (value := getattr(params, field.name)) != getattr(defaults, field.name) and field.name != "max_tokens"
    }
    names = {"n": "num_return_sequences", "stop": "stop_words", "logprobs": "num_logprobs"}
    allowed = {
        "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "seed", "min_tokens", "ignore_eos", "stop", "include_stop_str_in_output", "bad_words", "logprobs",
    }  # fmt: skip
    unknown = sorted(set(changed) - allowed)
    if unknown:
        raise ServingError(f"the server has no input for {', '.join(unknown)}; leave it out")
    return {names.get(name, name): value for name, value in changed.items()}


FLOATS = {"temperature", "top_p", "runtime_top_p", "min_p", "repetition_penalty", "presence_penalty",
          "frequency_penalty", "timeout_s"}  # fmt: skip


def _tensor(name: str, value: Any) -> Any:
    """[1, 1], or [1, n] for lists of strings."""
    if isinstance(value, (list, tuple)):
        data, kind = np.array([[text.encode() for text in value]], dtype=np.object_), "BYTES"
    elif name == "seed":
        data, kind = np.array([[value]], np.uint64), "UINT64"
    else:
        kind, dtype = TENSOR_TYPES[float if name in FLOATS else type(value)]
        data = np.array([[value]], dtype)
    tensor = triton.InferInput(name, list(data.shape), kind)
    tensor.set_data_from_numpy(data)
    return tensor


def _chunk(result: Any) -> Chunk:
    text = result.as_numpy("text_output")
    text = result.as_numpy("text_piece") if text is None else text
    reason, message = _text(result, "finish_reason"), _text(result, "error_message")
    if message:
        raise ServingError(message)
    index, rows = result.as_numpy("sequence_index"), _text(result, "logprobs")
    return Chunk(
        text=bytes(text.reshape(-1)[0]).decode(),
        token_ids=tuple(result.as_numpy("output_ids").reshape(-1).tolist()),
        index=0 if index is None else int(index.reshape(-1)[0]),
        finish_reason=reason or None,
        logprobs=tuple(json.loads(rows)) if rows else None,
    )


def _text(result: Any, name: str) -> str:
    values = result.as_numpy(name)
    return "" if values is None or not values.size else bytes(values.reshape(-1)[0]).decode()
