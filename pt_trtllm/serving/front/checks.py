"""What a request's body must be before Triton 2.51 may read it.

Its HTTP server ends with all its models on JSON that is nested deeply, and on a tensor whose shape says far more than
its data. Both are refused here, with everything that Triton might read otherwise than this does: what is no JSON, and
names that come twice in one object, of which Triton takes the first and Python the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from pt_trtllm.errors import ConfigError

MAX_BODY_BYTES = 2 << 20
"""A prompt of 250,000 token ids takes less."""
MAX_DEPTH = 64
MAX_DIMENSIONS = 16


def check_body(body: bytes, json_length: str | None) -> None:
    """Raises ConfigError. `json_length` is how much of the body is JSON, where binary tensors follow."""
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdecimal() and int(json_length[:9]) <= len(body)):
            raise ConfigError(
                f"Inference-Header-Content-Length is {json_length[:20]!r}, expected 0 to {len(body)}, the body's length"
            )
        length = int(json_length[:9])
    else:
        length = len(body)
    document = _parsed(body[:length])
    for tensor in _items(document, "inputs"):
        _check_shape(tensor, len(body))


def _parsed(text: bytes) -> Any:
    try:
        document = json.loads(text.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ConfigError(f"the body is not JSON: {error}") from None
    level = _containers([document])
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return document
        level = [inner for node in level for inner in _containers(node.values() if isinstance(node, dict) else node)]
    raise _too_deep()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ConfigError("the body's JSON has an object with the same name twice")
    return found


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (dict, list))]


def _too_deep() -> ConfigError:
    return ConfigError(f"the body's JSON is nested more than {MAX_DEPTH} levels deep")


def _items(document: Any, name: str) -> list[dict[str, Any]]:
    found = document.get(name) if isinstance(document, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _check_shape(tensor: dict[str, Any], num_bytes: int) -> None:
    shape = tensor.get("shape")
    if not (isinstance(shape, list) and all(isinstance(size, int) for size in shape)):
        return  # Triton says so itself
    extent = math.prod(filter(None, shape[:MAX_DIMENSIONS]))  # a size of 0 excuses none of the others
    is_sound = len(shape) <= MAX_DIMENSIONS and all(size >= 0 for size in shape) and extent <= num_bytes
    if not is_sound:
        raise ConfigError(
            f"input {str(tensor.get('name'))[:100]!r} has shape {str(shape)[:100]}, which is more than the request's "
            f"{num_bytes} bytes can hold"
        )
