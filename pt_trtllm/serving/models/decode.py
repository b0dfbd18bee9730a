"""The core's inputs as engine requests."""

from __future__ import annotations

import json
from typing import Any

from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.params import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.models.triton import array, scalar, text, texts
from pt_trtllm.serving.sampling_fields import UNSUPPORTED, Given, sampling_params
from pt_trtllm.serving.tensors import CORE_INPUTS, CORE_PRIVATE_INPUTS
from pt_trtllm.serving.word_lists import unpack_words

DEFAULT_PRIORITY = Request.priority
NUMBERS = tuple(
    tensor.name
    for tensor in (*CORE_INPUTS, *CORE_PRIVATE_INPUTS)
    if tensor.dims == (1,) and tensor.dtype in ("INT32", "UINT64", "FP32", "BOOL")
)


def decode_requests(triton_request: Any, config: EngineConfig, tokenizer: Tokenizer) -> list[Request]:
    """One per prompt of the batch. Raises ConfigError for what this engine cannot serve."""
    ids = array(triton_request, "input_ids")
    for name, what in UNSUPPORTED.items():
        values = array(triton_request, name)
        if values is not None and values.size:
            raise ConfigError(f"{name} is set, but this engine does not support {what}; leave it out")
    vocab_size, eos_ids = config.checkpoint.model.vocab_size, tuple(config.checkpoint.model.eos_token_id)
    requests = []
    for row, tokens in enumerate(ids.reshape(len(ids), -1).tolist()):
        length = scalar(triton_request, "input_lengths", row)
        if not 0 <= length <= len(tokens):
            raise ConfigError(f"input_lengths is {length}, expected 0 to {len(tokens)}, the width of input_ids")
        priority = scalar(triton_request, "priority", row)
        label = f"prompt {row}" if len(ids) > 1 else "request"
        request = Request(
            prompt_ids=tuple(tokens[:length]),
            params=sampling_params(_given(triton_request, row, tokenizer, vocab_size), eos_ids, vocab_size),
            priority=DEFAULT_PRIORITY if priority is None else priority,
        ).with_token_bans(tokenizer, label)
        request.check(config, label)
        requests.append(request)
    return requests


def _given(triton_request: Any, row: int, tokenizer: Tokenizer, vocab_size: int) -> Given:
    stop = texts(triton_request, "stop_words", row)
    words = _words(triton_request, "stop_words_list", row) if not stop else ()
    for token in (token for word in words for token in word):
        if not 0 <= token < vocab_size:
            raise ConfigError(f"stop_words_list has token id {token}, outside the vocabulary of {vocab_size}")
    phrases = [word for word in words if len(word) > 1]  # only text can span several tokens
    longest = max(map(len, phrases), default=0)
    if len(phrases) > MAX_STOP_STRINGS or longest > MAX_STOP_LENGTH:  # before the work of spelling them
        raise ConfigError(
            f"stop_words_list has {len(phrases)} words of several tokens, the longest of {longest}; "
            f"expected at most {MAX_STOP_STRINGS} of at most {MAX_STOP_LENGTH}"
        )
    spelled = tuple(map(tokenizer.decode, phrases))
    bias, own_ids = array(triton_request, "embedding_bias"), array(triton_request, "stop_token_ids")
    return Given(
        values={name: scalar(triton_request, name, row) for name in NUMBERS},
        stop=stop or tuple(word for word in spelled if word),
        stop_ids=tuple(word[0] for word in words if len(word) == 1),
        bad_words=texts(triton_request, "bad_words", row),
        bad_ids=_words(triton_request, "bad_words_list", row),
        guide=_guide(triton_request, row),
        stop_token_ids=() if own_ids is None else tuple(own_ids.reshape(len(own_ids), -1)[row].tolist()),
        logit_bias=_json(triton_request, "logit_bias", row),
        own_bad_ids=_json(triton_request, "bad_words_ids", row),
        bias=() if bias is None or not bias.size else tuple(bias.reshape(len(bias), -1)[row].tolist()),
    )


def _guide(triton_request: Any, row: int) -> tuple[str, str] | None:
    kinds, guides = (texts(triton_request, f"guided_decoding_guide{suffix}", row) for suffix in ("_type", ""))
    if not kinds and not guides:
        return None
    return kinds[0] if kinds else "", guides[0] if guides else ""


def _json(triton_request: Any, name: str, row: int) -> Any:
    given = texts(triton_request, name, row)
    try:
        return json.loads(given[0]) if given else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from None


def _words(triton_request: Any, name: str, row: int) -> tuple[tuple[int, ...], ...]:
    packed = array(triton_request, name)
    return () if packed is None or not packed.size else unpack_words(packed[row], name)


def prompt_text(triton_request: Any, request: Request, row: int, tokenizer: Tokenizer) -> str:
    """What stands before the answer where the prompt is to be repeated."""
    given = array(triton_request, "prompt_text")
    if given is None:
        return tokenizer.decode(request.prompt_ids)
    return text(given.reshape(-1)[row], "prompt_text")
