"""One request to the core model: its answers, and the responses that carry them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pt_trtllm.runtime.request import Request
from pt_trtllm.serving.answer import Answer, Piece
from pt_trtllm.serving.error_marks import marked
from pt_trtllm.serving.models.triton import FINAL, error_response, strings


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What a request wants to hear."""

    streaming: bool
    include_prompt: bool
    log_probs: bool
    count_input: bool
    count_output: bool
    times: bool
    timeout_s: float | None
    outputs: frozenset[str]
    """What is not among these is not made: each tensor costs time per token."""


@dataclass
class Part:
    """One answer of a call: a prompt of its batch, a sample of its n."""

    answer: Answer
    batch_index: int
    sequence_index: int
    prompt_ids: list[int]
    prompt_text: str
    pieces: list[Piece] = field(default_factory=list)
    """Held back, for those who do not stream."""
    cumulative: float = 0.0
    was_sent: bool = False


class Call:
    """Its methods are called from one thread only: the sender may not be asked anything after the final response."""

    def __init__(self, triton_request: Any, options: CallOptions, num_prompts: int, num_samples: int) -> None:
        self.request_id: str = triton_request.request_id()
        self.stream_id = f"pt-{uuid.uuid4().hex}"
        self.options = options
        self.parts: dict[Answer, Part] = {}
        self.arrival_ns = time.time_ns()
        self.deadline = math.inf if options.timeout_s is None else time.monotonic() + options.timeout_s
        self.done = False
        self._many_prompts, self._many_samples = num_prompts > 1, num_samples > 1
        self._sender = triton_request.get_response_sender()
        self._sent = False

    def send(self, part: Part, piece: Piece) -> None:
        """Passes a piece on, or keeps it until the answer has ended."""
        if self.done:
            return
        if piece.error is not None and not self._sent:
            self.fail(piece.error)
            return
        if not self.options.streaming:
            part.pieces.append(piece)
            if piece.finish_reason is None:
                return
            piece = joined(part.pieces)
        if piece.token_ids or piece.text or piece.finish_reason:
            # Held in a name until they are sent: Triton drops outputs that nobody asked for without Python's lock, and
            # must not be the last to hold them.
            tensors = self._tensors(part, piece)
            self._sender.send(pb_utils.InferenceResponse(tensors))
            self._sent = part.was_sent = True
        if all(part.answer.finished for part in self.parts.values()):
            self._end()

    def fail(self, error: Exception) -> None:
        """Answers with an error. Only as the first response: an error in mid-stream would hang an ensemble."""
        if not self.done:
            self.done = True
            self._sender.send(error_response(error), flags=FINAL)

    def give_up(self, error: Exception) -> None:
        """Ends with an error whatever went wrong before, in mid-stream too."""
        if self.done:
            return
        try:
            if self._sent:
                part = next(iter(self.parts.values()))
                tensors = self._tensors(part, Piece(token_ids=[], text="", finish_reason="error", error=error))
                self._sender.send(pb_utils.InferenceResponse(tensors))
                self._end()
            else:
                self.fail(error)
        except Exception:  # nothing can be said any more, but the end
            self.done = True
            with contextlib.suppress(Exception):
                self._sender.send(flags=FINAL)

    def is_cancelled(self) -> bool:
        return not self.done and bool(self._sender.is_cancelled())

    def _end(self) -> None:
        self.done = True
        self._sender.send(flags=FINAL)

    def _tensors(self, part: Part, piece: Piece) -> list[Any]:
        options, answer = self.options, part.answer
        with_prompt = options.include_prompt and not part.was_sent
        ids = [*part.prompt_ids, *piece.token_ids] if with_prompt else piece.token_ids
        text = part.prompt_text + piece.text if with_prompt else piece.text
        wanted = options.outputs
        tensors = [pb_utils.Tensor("output_ids", np.array([[ids]], np.int32))] if "output_ids" in wanted else []
        if "sequence_length" in wanted:
            tensors.append(_number("sequence_length", len(ids)))
        if options.log_probs:
            values = [row[0][1] for row in piece.logprobs]
            part.cumulative += sum(values)
            tensors += [
                pb_utils.Tensor("cum_log_probs", np.array([[part.cumulative]], np.float32)),
                pb_utils.Tensor("output_log_probs", np.array([[values]], np.float32)),
                _string("logprobs", json.dumps(piece.logprobs)),
            ]
        if self._many_prompts:
            tensors.append(_number("batch_index", part.batch_index))
        if self._many_samples:
            tensors.append(_number("sequence_index", part.sequence_index))
        if options.count_input:
            tensors.append(_number("num_input_tokens", len(part.prompt_ids)))
        if options.count_output:
            tensors.append(_number("num_output_tokens", len(piece.token_ids)))
        if options.times and piece.finish_reason:
            tensors += self._times(answer)
        if piece.finish_reason:
            tensors.append(_string("finish_reason", piece.finish_reason))
        if piece.error is not None:
            tensors.append(_string("error_message", marked(piece.error)))
        if "text_piece" in wanted:
            tensors.append(_string("text_piece", text))
        if "stream_id" in wanted:
            tensors.append(_string("stream_id", self.stream_id))
        return tensors

    def _times(self, answer: Answer) -> list[Any]:
        first_s = (answer.first_token or time.monotonic()) - answer.started
        times = {
            "arrival_time_ns": self.arrival_ns,
            "first_token_time_ns": self.arrival_ns + int(first_s * 1e9),
            "last_token_time_ns": time.time_ns(),
        }
        return [pb_utils.Tensor(name, np.array([[value]], np.int64)) for name, value in times.items()]


def parts_of(request: Request) -> list[Request]:
    """One engine request for each of the n samples."""
    return [dataclasses.replace(request, params=params) for params in request.params.samples()]


def joined(pieces: list[Piece]) -> Piece:
    return Piece(
        token_ids=[token for piece in pieces for token in piece.token_ids],
        text="".join(piece.text for piece in pieces),
        logprobs=[row for piece in pieces for row in piece.logprobs],
        finish_reason=pieces[-1].finish_reason,
        error=pieces[-1].error,
    )


def _number(name: str, value: int) -> Any:
    return pb_utils.Tensor(name, np.array([[value]], np.int32))


def _string(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, strings(value).reshape(1, 1))
