"""What clients may ask: OpenAI's fields, and the sampling options that vLLM's users send beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pt_trtllm.errors import ConfigError
from pt_trtllm.openai import fields
from pt_trtllm.openai.errors import ApiError
from pt_trtllm.openai.messages import read_message
from pt_trtllm.runtime.params import MAX_LOGPROBS, MAX_SAMPLES, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own for completions; a chat may go on to the end of the context."""
MAX_PROMPTS = 256
MAX_ANSWERS = 1024
"""To all prompts of one request."""

SAMPLING = {
    "temperature": fields.NUMBER,
    "top_p": fields.NUMBER,
    "top_k": fields.WHOLE,
    "min_p": fields.NUMBER,
    "seed": fields.WHOLE,
    "presence_penalty": fields.NUMBER,
    "frequency_penalty": fields.NUMBER,
    "repetition_penalty": fields.NUMBER,
    "min_tokens": fields.WHOLE,
    "ignore_eos": fields.FLAG,
    "stop": fields.TEXT_OR_TEXTS,
    "stop_token_ids": fields.TOKENS,
    "include_stop_str_in_output": fields.FLAG,
    "logit_bias": fields.OBJECT,
}
"""Options that `SamplingParams` knows under the same names."""
COMMON = {
    **SAMPLING,
    "model": fields.TEXT,
    "max_tokens": fields.WHOLE,
    "n": fields.WHOLE,
    "stream": fields.FLAG,
    "stream_options": fields.OBJECT,
    "response_format": fields.OBJECT,
    "guided_json": fields.ANYTHING,
    "guided_regex": fields.TEXT,
    "guided_grammar": fields.TEXT,
    # Sent by many clients; they say who asks, not what.
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier"), fields.ANYTHING),
}


def _is_prompt_list(value: Any) -> bool:
    many = isinstance(value, list) and all(map(fields.is_tokens, value))
    return many or fields.is_texts(value) or fields.is_tokens(value)


COMPLETION = {
    **COMMON,
    "prompt": fields.Kind(
        lambda value: isinstance(value, str) or (bool(value) and _is_prompt_list(value)),
        "a string, a list of strings, a list of token ids or a list of such lists, none of them empty",
    ),
    "logprobs": fields.WHOLE,
    "echo": fields.FLAG,
    "best_of": fields.WHOLE,
    "suffix": fields.TEXT,
}
CHAT = {
    **COMMON,
    "messages": fields.LIST,
    "max_completion_tokens": fields.WHOLE,
    "logprobs": fields.FLAG,
    "top_logprobs": fields.WHOLE,
    "chat_template_kwargs": fields.OBJECT,
    "tools": fields.LIST,
    "tool_choice": fields.ANYTHING,
    "parallel_tool_calls": fields.ANYTHING,
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What both endpoints ask of the engine."""

    model: str | None
    params: SamplingParams
    """For one answer; its `max_tokens` is at least 1."""
    max_tokens: int | None
    """As asked. None: up to the end of the context. 0: nothing but the prompt itself and its log-probabilities."""
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    guide: tuple[str, str] | None = None
    """Kind (json, json_schema, regex, ebnf_grammar) and text of what the answer must match."""


@dataclass(frozen=True, kw_only=True)
class Completion(Question):
    prompts: tuple[str | tuple[int, ...], ...]
    logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True, kw_only=True)
class Chat(Question):
    messages: tuple[Mapping[str, Any], ...]
    logprobs: int | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)


def parse_completion(body: Any) -> Completion:
    given = fields.read_fields(body, COMPLETION)
    if given.get("suffix"):
        raise ApiError("suffix is not supported: the model only continues a text", param="suffix")
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise ApiError(
            f"best_of is {given['best_of']}, expected the same as n: answers are not ranked", param="best_of"
        )
    if "prompt" not in given:
        raise ApiError("prompt is missing, expected " + COMPLETION["prompt"].expected, param="prompt")
    prompt = given["prompt"]
    many = prompt if isinstance(prompt, list) and not fields.is_tokens(prompt) else [prompt]
    if len(many) > MAX_PROMPTS:
        raise ApiError(f"prompt has {len(many)} entries, expected at most {MAX_PROMPTS}", param="prompt")
    count = len(many) * given.get("n", 1)
    if len(many) > 1 and count > MAX_ANSWERS:
        raise ApiError(
            f"{len(many)} prompts with n = {given['n']} are {count} answers, expected at most {MAX_ANSWERS}; "
            "send several requests",
            param="n",
        )
    echo = given.get("echo", False)
    max_tokens = given.get("max_tokens", DEFAULT_MAX_TOKENS)
    return Completion(
        **_common(given, max_tokens, may_be_zero=echo),
        prompts=tuple(text if isinstance(text, str) else tuple(text) for text in many),
        logprobs=_count(given.get("logprobs"), "logprobs"),
        echo=echo,
    )


def parse_chat(body: Any) -> Chat:
    given = fields.read_fields(body, CHAT)
    if given.get("tools") and given.get("tool_choice") != "none":
        raise ApiError("tools are not supported by this server", param="tools")
    if not given.get("messages"):
        raise ApiError("messages is missing or empty, expected at least one message", param="messages")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    variables = given.get("chat_template_kwargs", {})
    taken = sorted(set(variables) & {"messages", "add_generation_prompt"})
    if taken:
        raise ApiError(f"chat_template_kwargs has {taken}, which the request itself decides", param=taken[0])
    return Chat(
        **_common(given, given.get("max_completion_tokens", given.get("max_tokens"))),
        messages=tuple(read_message(entry, index) for index, entry in enumerate(given["messages"])),
        logprobs=_count(given.get("top_logprobs", 0), "top_logprobs") if given.get("logprobs") else None,
        template_variables=variables,
    )


def _common(given: Mapping[str, Any], max_tokens: int | None, *, may_be_zero: bool = False) -> dict[str, Any]:
    lowest = 0 if may_be_zero else 1
    if max_tokens is not None and not lowest <= max_tokens < 1 << 31:
        raise ApiError(f"max_tokens is {max_tokens}, expected {lowest} to {(1 << 31) - 1}", param="max_tokens")
    count = given.get("n", 1)
    if not 1 <= count <= MAX_SAMPLES:
        raise ApiError(f"n is {count}, expected 1 to {MAX_SAMPLES}", param="n")
    options = given.get("stream_options", {})
    if options and not given.get("stream"):
        raise ApiError("stream_options needs stream to be true", param="stream_options")
    include_usage = options.get("include_usage") or False
    if not isinstance(include_usage, bool):
        raise ApiError(
            f"stream_options.include_usage is {fields.shown(include_usage)}, expected true or false",
            param="stream_options",
        )
    # Without a temperature OpenAI samples at 1; `SamplingParams` would be greedy.
    sampling = {"temperature": 1.0, **{name: given[name] for name in SAMPLING if name in given}}
    if sampling.get("stop") in ("", []):
        del sampling["stop"]
    try:
        params = SamplingParams(max_tokens=max(max_tokens or (1 << 31) - 1, 1), **sampling)
    except ConfigError as error:
        raise ApiError(str(error)) from None
    return {
        "model": given.get("model"),
        "params": params,
        "max_tokens": max_tokens,
        "n": count,
        "stream": given.get("stream", False),
        "include_usage": include_usage,
        "guide": _guide(given),
    }


def _guide(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """`response_format` as OpenAI has it, or vLLM's `guided_...` fields."""
    found = []
    if "guided_json" in given:
        schema = given["guided_json"]
        found.append(("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))
    if "guided_regex" in given:
        found.append(("regex", given["guided_regex"]))
    if "guided_grammar" in given:
        found.append(("ebnf_grammar", given["guided_grammar"]))
    response_format = given.get("response_format", {"type": "text"})
    kind = response_format.get("type")
    if kind == "json_object":
        found.append(("json", ""))
    elif kind == "json_schema":
        outer = response_format.get("json_schema")
        schema = outer.get("schema") if isinstance(outer, dict) else None
        if not isinstance(schema, dict):
            raise ApiError("response_format.json_schema.schema is missing, expected an object", param="response_format")
        found.append(("json_schema", json.dumps(schema)))
    elif kind != "text":
        raise ApiError(
            f"response_format.type is {fields.shown(kind)}, expected text, json_object or json_schema",
            param="response_format",
        )
    if len(found) > 1:
        raise ApiError(f"the answer is to match {len(found)} things at once, expected one", param="response_format")
    return found[0] if found else None


def _count(value: int | None, name: str) -> int | None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise ApiError(f"{name} is {value}, expected 0 to {MAX_LOGPROBS}", param=name)
    return value
