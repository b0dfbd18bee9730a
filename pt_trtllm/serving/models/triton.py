"""What every model of the repository does with Triton's Python backend."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pt_trtllm.errors import ConfigError, Kind, PtError
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.error_marks import marked

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CODES: dict[Kind, str] = {
    "invalid": "INVALID_ARG",
    "too_long": "INVALID_ARG",
    "queue_full": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
    "failed": "INTERNAL",
}
"""Names in `pb_utils.TritonError`, which is not there yet when models are imported."""


def parameters(args: dict[str, str]) -> dict[str, str]:
    """Of config.pbtxt; a hole that nobody filled (`${name}`) counts as not set."""
    declared = json.loads(args["model_config"])["parameters"]
    values = {key: entry["string_value"] for key, entry in declared.items()}
    return {key: value for key, value in values.items() if value and not value.startswith("${")}


def is_decoupled(args: dict[str, str]) -> bool:
    """Whether a request may have any number of responses, or has exactly one."""
    return bool(json.loads(args["model_config"]).get("model_transaction_policy", {}).get("decoupled"))


def flag(text: str | None, default: bool, name: str) -> bool:
    if text is None:
        return default
    if text.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"parameter {name} is {text!r}, expected true or false")
    return text.lower() in ("true", "1")


def open_tokenizer(values: dict[str, str]) -> Tokenizer:
    if "tokenizer_dir" not in values:
        raise ConfigError("config.pbtxt sets no tokenizer_dir, expected a folder with tokenizer.json")
    return Tokenizer(Path(values["tokenizer_dir"]))


def array(request: Any, name: str) -> Any:
    """An input, or None; [batch, ...] also where the model declares it as a scalar. `request` may also be inputs that
    were taken from one (`taken`)."""
    if isinstance(request, dict):
        return request.get(name)
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def taken(request: Any, names: Iterable[str]) -> dict[str, Any]:
    """Inputs that outlive `execute`: what a request shows of Triton's memory, it may not show later."""
    return {name: values.copy() for name in names if (values := array(request, name)) is not None}


def scalar(request: Any, name: str, row: int = 0) -> Any:
    """The value for one prompt of the batch, as a Python object; None when it is not given."""
    values = array(request, name)
    if values is None or values.size == 0:
        return None
    flat = values.reshape(len(values), -1)
    return flat[min(row, len(flat) - 1), 0].item() if flat.dtype != np.object_ else flat[min(row, len(flat) - 1), 0]


def text(value: Any, name: str) -> str:
    """Of a STRING element. Raises when it is not UTF-8."""
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from None


def texts(request: Any, name: str, row: int = 0) -> tuple[str, ...]:
    """A row of strings; clients send "" for none."""
    values = array(request, name)
    if values is None or values.size == 0:
        return ()
    flat = values.reshape(len(values), -1)
    return tuple(value for raw in flat[min(row, len(flat) - 1)] if (value := text(raw, name)))


def strings(*values: str) -> Any:
    """A one-dimensional STRING array."""
    return np.array([value.encode() for value in values], dtype=np.object_)


def error_response(error: Exception) -> Any:
    """What goes wrong with a request, for its client; a failure of the server goes to its log as well."""
    if not isinstance(error, PtError):
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
    kind = error.kind if isinstance(error, PtError) else "failed"
    code = getattr(pb_utils.TritonError, CODES[kind])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(marked(error), code))
