"""The types of sampling options, which JSON does not promise."""

from __future__ import annotations

from typing import Any

from pt_trtllm.config import shown
from pt_trtllm.runtime.values import is_number, is_token, is_whole


def wrong_types(params: object) -> list[str]:
    """A line for every option of the wrong type."""
    return [
        f"{name} is {shown(value)}, expected {expected}"
        for name, (is_valid, expected) in _KINDS.items()
        if not is_valid(value := getattr(params, name))
    ]


def _tokens(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_token, value))


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


_WHOLE = (is_whole, "a whole number")
_OPTIONAL_WHOLE = (lambda value: value is None or is_whole(value), "a whole number")
_NUMBER = (is_number, "a number")
_OPTIONAL_NUMBER = (lambda value: value is None or is_number(value), "a number")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("max_tokens", "n", "min_tokens"), _WHOLE),
    **dict.fromkeys(("top_k", "seed", "logprobs", "prompt_logprobs"), _OPTIONAL_WHOLE),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _NUMBER),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _OPTIONAL_NUMBER),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output"), _FLAG),
    **dict.fromkeys(("stop", "bad_words", "guided_choice"), (_texts, "a list of strings")),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_grammar"),
        (lambda value: value is None or isinstance(value, str), "text"),
    ),
    "stop_token_ids": (_tokens, "a list of token ids, each 0 to 2147483647"),
    "bad_words_ids": (
        lambda rows: isinstance(rows, tuple) and all(map(_tokens, rows)),
        "lists of token ids, each 0 to 2147483647",
    ),
    "logit_bias": (
        lambda bias: (
            bias is None or (isinstance(bias, dict) and all(map(is_token, bias)) and all(map(is_number, bias.values())))
        ),
        "numbers by token id, each id 0 to 2147483647",
    ),
}
"""Every option: a check of its type, and what to say was expected."""
