"""The `postprocessing` model: token ids to text.

Our core sends each piece's text along, for only it knows the tokens before; then this model passes it on, and looks
whether the client has left. Clients of this model alone, and TensorRT-LLM's core, send tokens only: they are decoded.
"""

from __future__ import annotations

import time
from typing import Any

import triton_python_backend_utils as pb_utils

from pt_trtllm.errors import ConfigError
from pt_trtllm.serving.models.ask import Calls
from pt_trtllm.serving.models.triton import array, error_response, open_tokenizer, parameters, scalar, strings

CHECK_PERIOD_S = 0.1
REMEMBER_S = 60.0


class PostprocessModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = parameters(args)
        self._tokenizer = open_tokenizer(values)
        self._core = values.get("tensorrt_llm_model_name", "tensorrt_llm")
        self._checked: dict[str, float] = {}
        """When a stream's client was last looked after; the oldest first."""
        self._calls = Calls()

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", self._text(request))]))
                self._stop_if_abandoned(request)
            except Exception as error:  # one bad request must not fail the others
                responses.append(error_response(error))
        return responses

    def _text(self, request: Any) -> Any:
        """One-dimensional, as published clients read it."""
        piece = array(request, "TEXT_PIECE")
        if piece is not None:
            return piece.reshape(-1)
        tokens, lengths = array(request, "TOKENS_BATCH"), array(request, "SEQUENCE_LENGTH")
        if tokens is None or lengths is None:
            raise ConfigError("expected TOKENS_BATCH and SEQUENCE_LENGTH, which say what to decode")
        rows = tokens.reshape(-1, tokens.shape[-1])
        return strings(
            *(self._tokenizer.decode([token for token in row[:length] if token >= 0])
              for row, length in zip(rows.tolist(), lengths.reshape(-1).tolist(), strict=True))
        )  # fmt: skip

    def _stop_if_abandoned(self, request: Any) -> None:
        """An ensemble does not tell the core that its client has left, but this step hears of it."""
        stream = scalar(request, "STREAM_ID")
        if stream is None:
            return
        stream, now = bytes(stream).decode(), time.monotonic()
        if now - self._checked.get(stream, 0.0) < CHECK_PERIOD_S:
            return
        self._checked.pop(stream, None)
        self._checked[stream] = now
        while now - next(iter(self._checked.values())) > REMEMBER_S:
            del self._checked[next(iter(self._checked))]
        if self._calls.is_cancelled(request):
            self._calls.stop(self._core, stream)
