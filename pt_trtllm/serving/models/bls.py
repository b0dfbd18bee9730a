"""The `tensorrt_llm_bls` model: preprocessing and the core called from Python, text made here.

An instance answers one request after the other, in the thread that Triton calls it from; so the model has several
instances. It works with any core; TensorRT-LLM's sends tokens only, and their text grows here with all tokens before
them in view.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.detokenize import AnswerText
from pt_trtllm.serving import tensors as declared
from pt_trtllm.serving.error_marks import read_mark
from pt_trtllm.serving.models.ask import Calls
from pt_trtllm.serving.models.health import refuse_if_engine_is_down
from pt_trtllm.serving.models.triton import (
    FINAL,
    array,
    error_response,
    flag,
    is_decoupled,
    open_tokenizer,
    parameters,
    scalar,
    strings,
)
from pt_trtllm.serving.models.unary import refuse_stream

CANCEL_CHECK_S = 0.1
CORE_OUTPUTS = tuple(tensor.name for tensor in declared.CORE_OUTPUTS)
PRIVATE_OUTPUTS = tuple(tensor.name for tensor in declared.CORE_PRIVATE_OUTPUTS)
PUBLIC_OUTPUTS = frozenset(tensor.name for tensor in declared.ENSEMBLE_OUTPUTS)


class BlsModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = parameters(args)
        refuse_if_engine_is_down(values)
        self._tokenizer = open_tokenizer(values)
        self._core = values.get("tensorrt_llm_model_name", "tensorrt_llm")
        self._exclude = flag(values.get("exclude_input_in_output"), False, "exclude_input_in_output")
        self._with_private = flag(values.get("core_makes_text"), False, "core_makes_text")
        self._is_decoupled = is_decoupled(args)
        self._calls = Calls()

    def execute(self, requests: list[Any]) -> None:
        answer = self._answer if self._is_decoupled else self._answer_once
        for request in requests:
            answer(request, request.get_response_sender())

    def _answer(self, request: Any, sender: Any) -> None:
        """The sender may not be asked anything after the final response."""
        last = None
        try:
            if not self._calls.is_cancelled(sender):
                self._chain(request, sender)
                self._calls.is_cancelled(sender)  # lets go of what the chain's calls have kept
        except Exception as error:  # whatever it is, the client must hear of it
            last = error_response(error)
        if last is None:
            sender.send(flags=FINAL)
        else:
            sender.send(last, flags=FINAL)

    def _answer_once(self, request: Any, sender: Any) -> None:
        """Where models are not decoupled: everything in one response."""
        tensors: list[Any] = []  # held in a name until they are sent, as in `Call.send`
        try:
            if not self._calls.is_cancelled(sender):
                tensors = self._whole(request, sender)
                self._calls.is_cancelled(sender)  # lets go of what the chain's calls have kept
            response = pb_utils.InferenceResponse(tensors)
        except Exception as error:  # whatever it is, the client must hear of it
            response = error_response(error)
        sender.send(response, flags=FINAL)

    def _whole(self, request: Any, sender: Any) -> list[Any]:
        _refuse_drafts(request)
        refuse_stream(scalar(request, "stream"), "stream")
        request_id = f"bls-{uuid.uuid4().hex}"  # of the core's request alone: it may be stopped by that name
        inputs = self._inputs(request)
        with self._calls.stopped_when_cancelled(sender, self._core, request_id, CANCEL_CHECK_S):
            (made,) = self._core_responses(request_id, inputs)
        if self._with_private:
            made["text_output"] = made.pop("text_piece").reshape(-1)
        else:
            ids, lengths = made["output_ids"], made["sequence_length"].reshape(-1).tolist()
            rows = zip(ids.reshape(-1, ids.shape[-1]).tolist(), lengths, strict=True)
            made["text_output"] = strings(*(self._tokenizer.decode(row[:length]) for row, length in rows))
        return [pb_utils.Tensor(name, values) for name, values in made.items() if name in PUBLIC_OUTPUTS]

    def _chain(self, request: Any, sender: Any) -> None:
        _refuse_drafts(request)
        streams = bool(scalar(request, "stream"))
        texts: dict[Any, _Text] = defaultdict(lambda: _Text(AnswerText(self._tokenizer)))
        whole: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        next_check = time.monotonic() + CANCEL_CHECK_S
        own_id = f"bls-{uuid.uuid4().hex}"
        # Our core gives each stream a name of its own. Another core knows requests by their ids only, and clients may
        # have chosen the same: there it gets an id of ours.
        request_id = request.request_id() if self._with_private else own_id
        for made in self._core_responses(request_id, self._inputs(request)):
            stream = bytes(made["stream_id"].reshape(-1)[0]).decode() if "stream_id" in made else own_id
            key = tuple(
                int(made[name].reshape(-1)[0]) if name in made else 0 for name in ("batch_index", "sequence_index")
            )
            made["text_output"] = made.pop("text_piece").reshape(-1) if self._with_private else texts[key].add(made)
            if streams:
                _send(sender, made)
            else:
                whole[key].append(made)
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + CANCEL_CHECK_S
                if sender.is_cancelled():
                    self._calls.stop(self._core, stream)
        for pieces in whole.values():
            _send(sender, _joined(pieces))

    def _inputs(self, request: Any) -> list[Any]:
        """Preprocessed, and what goes to the core as it is. It streams where it can: a cancellation is seen early."""
        sources = declared.PREPROCESSING_STEP.items()
        given = [pb_utils.Tensor(n, values) for n, source in sources if (values := array(request, source)) is not None]
        response = pb_utils.InferenceRequest(
            model_name="preprocessing",
            requested_output_names=list(declared.PREPROCESSED.values()),
            inputs=given,
        ).exec()
        if response.has_error():
            raise read_mark(response.error().message()).as_error()
        made = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        values = {name: made[source] for name, source in declared.PREPROCESSED.items()}
        public = {tensor.name for tensor in declared.ENSEMBLE_INPUTS}
        for tensor in (*declared.CORE_INPUTS, *(declared.CORE_PRIVATE_INPUTS if self._with_private else ())):
            source = declared.RENAMED.get(tensor.name, tensor.name)
            if tensor.name not in values and source in public and (given_values := array(request, source)) is not None:
                values[tensor.name] = given_values
        count = len(values["input_ids"])
        values["streaming"] = np.full((count, 1), self._is_decoupled)
        if "exclude_input_in_output" not in values:
            values["exclude_input_in_output"] = np.full((count, 1), self._exclude)
        return [pb_utils.Tensor(name, value) for name, value in values.items()]

    def _core_responses(self, request_id: str, inputs: list[Any]) -> Iterator[dict[str, Any]]:
        """The tensors of each response, by name. Raises what the core refuses with."""
        request = pb_utils.InferenceRequest(
            model_name=self._core,
            request_id=request_id,
            requested_output_names=[*CORE_OUTPUTS, *(PRIVATE_OUTPUTS if self._with_private else ())],
            inputs=inputs,
        )
        for response in self._calls.responses(request):
            if response.has_error():
                raise read_mark(response.error().message()).as_error()
            tensors = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if "output_ids" in tensors:
                yield tensors


def _refuse_drafts(request: Any) -> None:
    for name in ("num_draft_tokens", "use_draft_logits"):
        if scalar(request, name):
            raise ConfigError(f"{name} is set, but there is no draft model; leave it out")


class _Text:
    """The text of one answer from a core that sends tokens only."""

    def __init__(self, answer: AnswerText) -> None:
        self._answer, self._num_shown = answer, 0

    def add(self, made: dict[str, Any]) -> Any:
        length = int(made["sequence_length"].reshape(-1)[0])
        for token in made["output_ids"].reshape(-1)[:length].tolist():
            self._answer.add(token)
        visible = self._answer.visible
        piece, self._num_shown = visible[self._num_shown :], len(visible)
        return strings(piece)


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """One response for all of an answer: what grows is put together, the rest is as in the last piece."""
    joined = dict(pieces[-1])
    joined["text_output"] = strings("".join(bytes(piece["text_output"][0]).decode() for piece in pieces))
    for name in ("output_ids", "output_log_probs"):
        if name in joined:
            joined[name] = np.concatenate([piece[name] for piece in pieces], axis=-1)
    if "num_output_tokens" in joined:
        joined["num_output_tokens"] = sum(piece["num_output_tokens"] for piece in pieces)
    if "logprobs" in joined:
        rows = [row for piece in pieces for row in json.loads(bytes(piece["logprobs"].reshape(-1)[0]))]
        joined["logprobs"] = strings(json.dumps(rows)).reshape(1, 1)
    return joined


def _send(sender: Any, made: dict[str, Any]) -> None:
    tensors = [pb_utils.Tensor(name, values) for name, values in made.items() if name in PUBLIC_OUTPUTS]
    sender.send(pb_utils.InferenceResponse(tensors))
