"""From TensorRT-LLM's names and habits to SamplingParams."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.params import SamplingParams

UNSUPPORTED = {
    "decoder_input_ids": "encoder-decoder models",
    "draft_input_ids": "draft tokens from outside",
    "draft_logits": "draft tokens from outside",
    "lora_weights": "LoRA adapters",
    "lora_task_id": "LoRA adapters",
    "prompt_embedding_table": "prompt tables",
    "context_phase_params": "disaggregated serving",
    "runtime_top_p_min": "a decaying top_p",
    "runtime_top_p_decay": "a decaying top_p",
}
"""Inputs of the core that ask for what this engine cannot do, and what that is."""
GUIDE_TYPES = {"json_schema": "guided_json", "regex": "guided_regex", "ebnf_grammar": "guided_grammar",
               "choice": "guided_choice"}  # fmt: skip
"""Kinds of guides that come with a text, as our options. `choice`, a JSON list of texts, is our own; the others are
TensorRT-LLM's."""
ANY_JSON = '{"type": "object"}'


@dataclass(frozen=True, kw_only=True)
class Given:
    """The inputs of one prompt; None for those that were not sent."""

    values: dict[str, Any]
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    bad_ids: tuple[tuple[int, ...], ...] = ()
    bias: tuple[float, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Any = None
    """As it came, to be checked; so is `own_bad_ids`."""
    own_bad_ids: Any = None
    guide: tuple[str, str] | None = None
    """guided_decoding_guide_type and guided_decoding_guide"""


def sampling_params(given: Given, eos_ids: tuple[int, ...], vocab_size: int) -> SamplingParams:
    """Raises ConfigError for what is out of range, or not supported."""
    values = given.values
    if (values.get("beam_width") or 1) > 1:
        raise ConfigError(f"beam_width is {values['beam_width']}, expected 1: there is no beam search; "
                          "num_return_sequences with a temperature gives several answers")  # fmt: skip
    options: dict[str, Any] = {
        "max_tokens": values["request_output_len"],
        "n": _or(values.get("num_return_sequences"), 1),
        "temperature": values.get("temperature"),
        "top_k": values.get("runtime_top_k"),
        "top_p": _positive(values.get("runtime_top_p")),
        "min_p": _positive(values.get("min_p")),
        "repetition_penalty": _or(values.get("repetition_penalty"), 1.0),
        "presence_penalty": _or(values.get("presence_penalty"), 0.0),
        "frequency_penalty": _or(values.get("frequency_penalty"), 0.0),
        "seed": _or(values.get("seed"), values.get("random_seed")),
        "min_tokens": _or(values.get("min_tokens"), _or(values.get("min_length"), 0)),
        "include_stop_str_in_output": bool(values.get("include_stop_str_in_output")),
        "stop": given.stop,
        "bad_words": given.bad_words,
        "bad_words_ids": _bad_words_ids(given),
        "logit_bias": _logit_bias(given),
        "logprobs": _logprobs(values),
    }
    ignore_eos, stop_token_ids = _end(values.get("end_id"), eos_ids, vocab_size)
    options["ignore_eos"] = ignore_eos or bool(values.get("ignore_eos"))
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}, expected a finite number")
    return SamplingParams(
        **options, **_guided(given.guide), stop_token_ids=stop_token_ids + given.stop_ids + given.stop_token_ids
    )


def _bad_words_ids(given: Given) -> Any:
    """Words that came as text, too, are not taken a second time."""
    tokens = given.bad_ids if not given.bad_words else ()
    if given.own_bad_ids is None:
        return tokens
    return tokens + tuple(given.own_bad_ids) if isinstance(given.own_bad_ids, list) else given.own_bad_ids


def _logit_bias(given: Given) -> Any:
    bias = {token: value for token, value in enumerate(given.bias) if value}
    if given.logit_bias is not None and bias:
        raise ConfigError("embedding_bias and logit_bias are set, expected one of them")
    return bias or given.logit_bias


def _guided(guide: tuple[str, str] | None) -> dict[str, Any]:
    """TensorRT-LLM's four kinds of guides as our options."""
    if guide is None:
        return {}
    kind, text = guide
    if kind == "json":
        return {"guided_json": ANY_JSON}
    if kind not in GUIDE_TYPES:
        raise ConfigError(f"guided_decoding_guide_type is {kind!r}, expected one of {['json', *GUIDE_TYPES]}")
    if not text:
        raise ConfigError(f"guided_decoding_guide is empty, expected the {kind}")
    if kind == "choice":
        try:
            return {GUIDE_TYPES[kind]: json.loads(text)}
        except (ValueError, RecursionError):
            raise ConfigError(f"guided_decoding_guide is {text[:80]!r}, expected a JSON list of choices") from None
    return {GUIDE_TYPES[kind]: text}


def _end(end_id: int | None, eos_ids: tuple[int, ...], vocab_size: int) -> tuple[bool, tuple[int, ...]]:
    """(whether the model's own end tokens count, others). Any id outside the vocabulary means: do not end."""
    if end_id is None or end_id in eos_ids:
        return False, ()
    return True, (end_id,) if 0 <= end_id < vocab_size else ()


def _logprobs(values: dict[str, Any]) -> int | None:
    count = values.get("num_logprobs")
    return count if count is not None else 0 if values.get("return_log_probs") else None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _positive(value: float | None) -> float | None:
    """Clients send 0 for "not set"."""
    return None if value is None or value <= 0 else value
