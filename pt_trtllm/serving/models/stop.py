"""How other models of the repository stop a request of the core."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils


def stop_core(core: str, request_id: str) -> None:
    """`request_id`: of the request to the core, or the stream id that our core gives. Its stream ends normally."""
    inputs = [
        pb_utils.Tensor("input_ids", np.zeros((1, 1), np.int32)),
        pb_utils.Tensor("input_lengths", np.ones((1, 1), np.int32)),
        pb_utils.Tensor("request_output_len", np.ones((1, 1), np.int32)),
        pb_utils.Tensor("stop", np.ones((1, 1), bool)),
    ]
    stop = pb_utils.InferenceRequest(
        model_name=core, request_id=request_id, requested_output_names=["output_ids"], inputs=inputs
    )
    for _ in stop.exec(decoupled=True):
        pass
