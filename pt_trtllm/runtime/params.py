"""How to continue a prompt: every option, with its checks."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from pt_trtllm.config import problems_to_error

GREEDY_TEMPERATURE = 1e-5
"""Below this, sampling is as good as greedy and would only overflow."""
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_GUIDE = 1 << 18
"""Characters of a schema, an expression or a grammar."""
SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of parallel samples: odd, so that all differ, and far from what people write."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; names and meanings are vLLM's and TensorRT-LLM's. Unset options mean greedy.

    Lists may be given for tuples, and numbers as text for the keys of `logit_bias`, as JSON has them.
    """

    max_tokens: int = 64
    n: int = 1
    """Answers per prompt. Sample 0 is what n = 1 gives; the others have seeds derived from the seed."""
    temperature: float | None = None
    """None: 1 where another sampling option is set, otherwise greedy. 0: greedy."""
    top_k: int | None = None
    """Only the k most likely tokens; None or 0 for all."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Only tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens whatever else is in the batch; None draws a new one."""
    min_tokens: int = 0
    """No end token is drawn and no stop string counts before this many tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """The answer ends, and its text is cut, where one of these begins."""
    include_stop_str_in_output: bool = False
    """Cut the text behind the stop string instead."""
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these tokens before anything else."""
    bad_words: tuple[str, ...] = ()
    """Never produced, neither at the beginning of a text nor after a blank."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never produced."""
    logprobs: int | None = None
    """Report the log-probability of every generated token, and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, from the second on."""
    guided_json: str | None = None
    """The answer is JSON of this schema (text or object; {} for any JSON)."""
    guided_regex: str | None = None
    """The answer matches this regular expression, whole."""
    guided_grammar: str | None = None
    """The answer is of this context-free grammar, in Lark's or GBNF's notation."""
    guided_choice: tuple[str, ...] = ()
    """The answer is one of these."""

    def __post_init__(self) -> None:
        self._normalise()
        what = "sampling options"
        problems_to_error(what, self._wrong_types())
        checks = [
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}, expected at least 1"),
            (1 <= self.n <= MAX_SAMPLES, f"n is {self.n}, expected 1 to {MAX_SAMPLES}"),
            (self.n == 1 or not self.is_greedy, f"n is {self.n}, but greedy answers are all alike; set a temperature"),
            (_in(self.temperature, 0.0, 1e4), f"temperature is {self.temperature}, expected 0 or more"),
            (self.top_k is None or self.top_k >= 0, f"top_k is {self.top_k}, expected 0 (off) or more"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}, expected above 0 and at most 1"),
            (_in(self.min_p, 0.0, 1.0), f"min_p is {self.min_p}, expected between 0 and 1"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty is {self.repetition_penalty}, expected above 0",
            ),
            (_in(self.presence_penalty, -2.0, 2.0), f"presence_penalty is {self.presence_penalty}, expected -2 to 2"),
            (
                _in(self.frequency_penalty, -2.0, 2.0),
                f"frequency_penalty is {self.frequency_penalty}, expected -2 to 2",
            ),
            (
                self.seed is None or 0 <= self.seed < 1 << 64,
                f"seed is {self.seed}, expected a whole number from 0 to 2^64 - 1",
            ),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {self.min_tokens}, expected 0 to max_tokens {self.max_tokens}",
            ),
            (all(self.stop), "stop has an empty string, expected at least one character"),
            (all(self.bad_words), "bad_words has an empty string, expected at least one character"),
            (all(self.bad_words_ids), "bad_words_ids has an empty sequence, expected at least one token"),
            (
                all(_in(bias, -100.0, 100.0) for bias in (self.logit_bias or {}).values()),
                f"logit_bias is {self.logit_bias}, expected values from -100 to 100",
            ),
            (_in(self.logprobs, 0, MAX_LOGPROBS), f"logprobs is {self.logprobs}, expected 0 to {MAX_LOGPROBS}"),
            (
                _in(self.prompt_logprobs, 0, MAX_LOGPROBS),
                f"prompt_logprobs is {self.prompt_logprobs}, expected 0 to {MAX_LOGPROBS}",
            ),
            (
                sum(bool(getattr(self, name)) for name in _GUIDES) <= 1,
                f"{' and '.join(name for name in _GUIDES if getattr(self, name))} are set, expected at most one guide",
            ),
            (all(self.guided_choice), "guided_choice has an empty string, expected at least one character"),
            (all(len(text) <= MAX_GUIDE for text in self._guides()), f"a guide is longer than {MAX_GUIDE} characters"),
        ]
        problems_to_error(what, [message for valid, message in checks if not valid])

    def without_guide(self) -> SamplingParams:
        return dataclasses.replace(self, guided_json=None, guided_regex=None, guided_grammar=None, guided_choice=())

    @property
    def guide(self) -> tuple[str, str] | None:
        """(name of the option, its text) where the answer is guided."""
        for name in _GUIDES:
            if value := getattr(self, name):
                return name, value if isinstance(value, str) else json.dumps(value)
        return None

    @property
    def is_greedy(self) -> bool:
        if self.top_k == 1:
            return True
        if self.temperature is None:
            return not self.top_k and self.top_p is None and self.min_p is None
        return self.temperature < GREEDY_TEMPERATURE

    def samples(self) -> list[SamplingParams]:
        """One for each of the n answers. Only the first asks about the prompt: it is the same for all."""
        return [
            dataclasses.replace(
                self,
                n=1,
                seed=None if self.seed is None else (self.seed + index * SEED_STEP) % (1 << 64),
                prompt_logprobs=None if index else self.prompt_logprobs,
            )
            for index in range(self.n)
        ]

    def _guides(self) -> list[str]:
        return [text for text in (self.guided_json, self.guided_regex, self.guided_grammar) if text]

    def _normalise(self) -> None:
        """Lists become tuples, one stop string a tuple of one, and textual keys numbers."""
        stop: Any = self.stop
        changed: dict[str, Any] = {name: _tuples(getattr(self, name)) for name in _TUPLES}
        if isinstance(stop, str):
            changed["stop"] = (stop,)
        schema: Any = self.guided_json
        if isinstance(schema, dict):
            changed["guided_json"] = json.dumps(schema)
        if isinstance(self.logit_bias, dict):
            changed["logit_bias"] = {_number_of(key): value for key, value in self.logit_bias.items()}
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    def _wrong_types(self) -> list[str]:
        return [
            f"{name} is {str(value)[:80] if not isinstance(value, str) else repr(value)[:80]}, expected {expected}"
            for name, (is_valid, expected) in _KINDS.items()
            if not is_valid(value := getattr(self, name))
        ]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _number_of(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key


def _in(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tokens(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_whole, value))


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


_GUIDES = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
_TUPLES = ("stop_token_ids", "stop", "bad_words", "bad_words_ids", "guided_choice")
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
    **dict.fromkeys(_GUIDES[:3], (lambda value: value is None or isinstance(value, str), "text")),
    "stop_token_ids": (_tokens, "a list of token ids"),
    "bad_words_ids": (lambda rows: isinstance(rows, tuple) and all(map(_tokens, rows)), "lists of token ids"),
    "logit_bias": (
        lambda bias: (
            bias is None or (isinstance(bias, dict) and all(map(is_whole, bias)) and all(map(is_number, bias.values())))
        ),
        "numbers by token id",
    ),
}
"""Every option: a check of its type, and what to say was expected."""
