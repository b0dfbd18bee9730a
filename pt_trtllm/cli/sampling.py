"""The sampling options of every command that generates, on their way to SamplingParams."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from pt_trtllm.cli.requests import parse_json, text_or_file
from pt_trtllm.runtime.params import SamplingParams

OPTIONS = (
    click.option("--temperature", type=float, help="0 is greedy.  [default: greedy unless another option is set]"),
    click.option("--top-k", type=int),
    click.option("--top-p", type=float),
    click.option("--min-p", type=float),
    click.option("--repetition-penalty", type=float, default=1.0),
    click.option("--presence-penalty", type=float, default=0.0),
    click.option("--frequency-penalty", type=float, default=0.0),
    click.option("--seed", type=int),
    click.option("--min-tokens", type=int, default=0),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True),
    click.option("--ignore-eos", is_flag=True),
    click.option("--stop", multiple=True, help="End the answer where this text begins."),
    click.option("--include-stop-str-in-output", is_flag=True, help="End it behind that text instead."),
    click.option("--logit-bias", help='JSON: {"TOKEN_ID": -100 to 100}, added to logits.'),
    click.option("--bad-word", "bad_words", multiple=True, help="Never produce this text."),
    click.option("--bad-words-ids", help="Never produce these tokens, as JSON: [[1,2],[3]]."),
    click.option("--guided-json", help="The answer is JSON of this schema: JSON text, or @FILE."),
    click.option("--guided-regex", help="The answer matches this regular expression."),
    click.option("--guided-grammar", help="The answer is of this grammar (Lark or GBNF): text, or @FILE."),
    click.option("--guided-choice", multiple=True, help="The answer is one of these texts."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return reduce(lambda decorated, option: option(decorated), reversed(OPTIONS), command)


def sampling_params(max_tokens: int, given: dict[str, Any]) -> SamplingParams:
    """`given`: the values of these options, and of others that are fields of SamplingParams."""
    values = dict(given)
    for name in ("logit_bias", "bad_words_ids"):
        if values[name] is None:
            del values[name]
        else:
            values[name] = parse_json(values[name], _option(name))
    for name in ("guided_json", "guided_grammar"):
        values[name] = text_or_file(values[name], _option(name))
    return SamplingParams(max_tokens=max_tokens, **values)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
