"""A question as the tensors of TensorRT-LLM's core model in Triton, and its responses as tokens."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferResult
from tritonclient.utils import triton_to_np_dtype

from pt_trtllm.openai.errors import ApiError
from pt_trtllm.runtime.params import SamplingParams

NO_END_ID = -1
"""Outside every vocabulary: the usual way to say that the end token ends nothing."""


@dataclass(frozen=True)
class Piece:
    """What one response adds to an answer."""

    tokens: list[int]
    finish_reason: str | None = None
    error: str | None = None
    """Why the engine could not go on."""
    logprobs: list[float] | None = None
    """Of these tokens."""
    rows: list[list[tuple[int, float, int]]] | None = None
    """(token, log-probability, rank) of each token, then of the most likely others."""
    logits: np.ndarray[Any, Any] | None = None
    """float32 [tokens, vocabulary], from which each of them was drawn"""
    prompt_logits: np.ndarray[Any, Any] | None = None
    """float32 [prompt tokens, vocabulary]"""


def sampling_values(params: SamplingParams) -> dict[str, Any]:
    """Only what was asked for, by tensor name. What is left out has the server's default, with two exceptions:
    servers differ on what no temperature means, and the seed that some take by default is always the same."""
    values: dict[str, Any] = {"seed": seed_of(params)}
    if params.is_greedy:
        values["runtime_top_k"] = 1
    else:
        values["temperature"] = 1.0 if params.temperature is None else params.temperature
        values["runtime_top_p"] = 1.0 if params.top_p is None else params.top_p
        if params.top_k:
            values["runtime_top_k"] = params.top_k
        if params.min_p:
            values["min_p"] = params.min_p
    for name, default in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if getattr(params, name) != default:
            values[name] = getattr(params, name)
    if params.min_tokens:
        values["min_tokens"] = params.min_tokens
    if params.ignore_eos:
        values["end_id"] = NO_END_ID
    if params.stop_token_ids:
        values["stop_words_list"] = word_list([[token] for token in params.stop_token_ids])
    return values


def seed_of(params: SamplingParams) -> int:
    return secrets.randbits(63) if params.seed is None else params.seed


def word_list(words: Sequence[Sequence[int]]) -> list[list[int]]:
    """TensorRT-LLM's form: all ids end to end, and the end offset of each word, padded with -1."""
    ids = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    return [ids, ends + [-1] * (len(ids) - len(ends))]


def bias_values(bias: Mapping[int, float], vocab_size: int) -> np.ndarray[Any, Any]:
    wrong = next((token for token in bias if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ApiError(f"logit_bias has token {wrong}, outside the vocabulary of {vocab_size}", param="logit_bias")
    values = np.zeros(vocab_size, dtype=np.float32)
    values[list(bias)] = list(bias.values())
    return values


def to_inputs(values: Mapping[str, Any], declared: Mapping[str, str], model: str) -> list[InferInput]:
    """Raises for an option that the server's model has no tensor for."""
    inputs = []
    for name, value in values.items():
        if name not in declared:
            option = name.removeprefix("runtime_")
            raise ApiError(
                f"{option} is not supported: the server's model {model!r} has no input {name!r}", param=option
            )
        plain = _array(name, value, declared[name])
        array = plain.reshape(1, *(plain.shape or (1,)))
        tensor = InferInput(name, list(array.shape), declared[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _array(name: str, value: Any, kind: str) -> np.ndarray[Any, Any]:
    """Raises for a number that the type does not hold; numpy would wrap it around."""
    if kind == "BYTES":
        return np.asarray([text.encode() for text in ([value] if isinstance(value, str) else value)], dtype=np.object_)
    if kind != "INT32":
        return np.asarray(value, dtype=triton_to_np_dtype(kind))
    try:
        wide = np.asarray(value, dtype=np.int64)
    except OverflowError:
        wide = np.asarray(np.iinfo(np.int64).max)
    if wide.size and not np.iinfo(np.int32).min <= wide.min() <= wide.max() <= np.iinfo(np.int32).max:
        option = name.removeprefix("runtime_")
        raise ApiError(f"{option} has a number beyond what the server's INT32 holds", param=option)
    return wide.astype(np.int32)


def to_piece(result: InferResult) -> Piece:
    """The first beam of a response; one that only says that the answer is complete has no tokens."""
    ids, lengths = result.as_numpy("output_ids"), result.as_numpy("sequence_length")
    tokens: list[int] = [] if ids is None or ids.size == 0 else ids.reshape(-1, ids.shape[-1])[0].tolist()
    if lengths is not None:
        del tokens[int(lengths.reshape(-1)[0]) :]  # beams are padded to the longest
    logprobs, rows = _rows(result, "output_log_probs"), _text(result, "logprobs")
    return Piece(
        tokens,
        _text(result, "finish_reason"),
        _text(result, "error_message"),
        None if logprobs is None else logprobs[0, : len(tokens)].tolist(),
        None if rows is None else json.loads(rows),
        _rows(result, "generation_logits"),
        _rows(result, "context_logits"),
    )


def _rows(result: InferResult, name: str) -> np.ndarray[Any, Any] | None:
    values = result.as_numpy(name)
    if values is None or values.size == 0:
        return None
    return np.asarray(values, dtype=np.float32).reshape(-1, values.shape[-1])


def _text(result: InferResult, name: str) -> str | None:
    values = result.as_numpy(name)
    if values is None or values.size == 0:
        return None
    return bytes(values.reshape(-1)[0]).decode() or None
