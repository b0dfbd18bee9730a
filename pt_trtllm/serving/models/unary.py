"""A request to the core where models are not decoupled: one response, for all of its prompts and samples.

`execute` has long returned by then: Triton's Python backend lets a response follow later in this mode, too, so that
the engine's batch takes new requests while others are being answered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pt_trtllm.errors import ConfigError
from pt_trtllm.serving.answer import Piece
from pt_trtllm.serving.models.call import Call, CallOptions, Part, joined
from pt_trtllm.serving.models.triton import FINAL

NOT_HERE = frozenset({"stream_id", "batch_index", "sequence_index"})
"""Nobody stops a stream that there is not, and rows and columns say which answer is which."""
NO_STREAM = (
    "{name} is true, but this model gives one response per request: it was deployed with --no-decoupled; leave {name} "
    "out, or deploy without --no-decoupled"
)


def refuse_stream(streams: Any, name: str) -> None:
    if streams:
        raise ConfigError(NO_STREAM.format(name=name))


class UnaryCall(Call):
    """Tensors have the form [prompts, samples, ...]; what is shorter than the longest is filled up with `pad_id`."""

    def __init__(
        self, triton_request: Any, options: CallOptions, num_prompts: int, num_samples: int, pad_id: int
    ) -> None:
        super().__init__(triton_request, options, num_prompts, num_samples)
        self._num_prompts, self._pad_id = num_prompts, max(0, pad_id)

    def send(self, part: Part, piece: Piece) -> None:
        if self.done:
            return
        if piece.error is not None:
            self.fail(piece.error)
            return
        part.pieces.append(piece)
        if all(part.answer.finished for part in self.parts.values()):
            tensors = self._all_tensors()  # held in a name until they are sent, as in `Call.send`
            self.done = True
            self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)

    def _all_tensors(self) -> list[Any]:
        rows = [
            {tensor.name(): tensor.as_numpy() for tensor in self._tensors(part, joined(part.pieces))}
            for part in self.parts.values()
        ]
        return [
            pb_utils.Tensor(name, stack([row[name] for row in rows], self._num_prompts, self._pad_id))
            for name in rows[0]
            if name not in NOT_HERE
        ]


def stack(values: list[Any], num_prompts: int, pad_id: int) -> Any:
    """[1, 1, ...] of each answer as [prompts, samples, ...] of all; the last of three axes may differ in length."""
    first = values[0]
    if first.ndim > 2:
        longest = max(value.shape[-1] for value in values)
        fill = pad_id if first.dtype == np.int32 else 0
        values = [
            np.pad(value, ((0, 0), (0, 0), (0, longest - value.shape[-1])), constant_values=fill) for value in values
        ]
    return np.concatenate(values).reshape(num_prompts, -1, *values[0].shape[2:])
