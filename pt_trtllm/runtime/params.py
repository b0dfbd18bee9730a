"""How to continue a prompt: every option, with its checks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pt_trtllm.config import problems_to_error, shown
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.param_types import wrong_types
from pt_trtllm.runtime.values import is_encodable

GREEDY_TEMPERATURE = 1e-5
"""Below this, sampling is as good as greedy and would only overflow."""
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_WHOLE = (1 << 31) - 1
"""What the tensors of TensorRT-LLM's models hold."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 1024
"""Every token is compared with all of them."""
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS, MAX_BAD_LENGTH, MAX_BAD_TOKENS = 1024, 1024, 1 << 15
"""Sequences, of which a word makes two; characters of a word; tokens of all together, or characters."""
MAX_BIASED = 1 << 18
"""Tokens with a bias, over all answers of a prompt, each of which gets its own: TensorRT-LLM's clients send one for the
whole vocabulary."""
MAX_GUIDE = 1 << 18
"""Characters of a schema, an expression, a grammar or all choices."""
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
        problems_to_error(what, wrong_types(self))
        bias = next((token for token, value in (self.logit_bias or {}).items() if not _in(value, -100.0, 100.0)), None)
        checks = [
            (
                1 <= self.max_tokens <= MAX_WHOLE,
                f"max_tokens is {shown(self.max_tokens)}, expected at least 1, at most {MAX_WHOLE}",
            ),
            (1 <= self.n <= MAX_SAMPLES, f"n is {shown(self.n)}, expected 1 to {MAX_SAMPLES}"),
            (
                self.n == 1 or not self.is_greedy,
                f"n is {shown(self.n)}, but greedy answers are all alike; set a temperature",
            ),
            (
                _in(self.temperature, 0.0, 1e4),
                f"temperature is {shown(self.temperature)}, expected 0 or more, at most 10000",
            ),
            (_in(self.top_k, 0, MAX_WHOLE), f"top_k is {shown(self.top_k)}, expected 0 (off) to {MAX_WHOLE}"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {shown(self.top_p)}, expected above 0, at most 1"),
            (_in(self.min_p, 0.0, 1.0), f"min_p is {shown(self.min_p)}, expected between 0 and 1"),
            (
                MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
                f"repetition_penalty is {shown(self.repetition_penalty)}, "
                f"expected {MIN_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY:g}",
            ),
            *(
                (_in(getattr(self, name), -2.0, 2.0), f"{name} is {shown(getattr(self, name))}, expected -2 to 2")
                for name in ("presence_penalty", "frequency_penalty")
            ),
            (
                _in(self.seed, 0, (1 << 64) - 1),
                f"seed is {shown(self.seed)}, expected a whole number from 0 to 2^64 - 1",
            ),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {shown(self.min_tokens)}, expected 0 to max_tokens {shown(self.max_tokens)}",
            ),
            (all(self.stop), "stop has an empty string, expected at least one character"),
            *_sizes("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_LENGTH),
            (
                len(self.stop_token_ids) <= MAX_STOP_TOKENS,
                f"stop_token_ids has {len(self.stop_token_ids)} entries, expected at most {MAX_STOP_TOKENS}",
            ),
            (all(self.bad_words), "bad_words has an empty string, expected at least one character"),
            (all(self.bad_words_ids), "bad_words_ids has an empty sequence, expected at least one token"),
            *_sizes("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_LENGTH),
            (
                sum(map(len, self.bad_words)) <= MAX_BAD_TOKENS,
                f"bad_words has {sum(map(len, self.bad_words))} characters, expected at most {MAX_BAD_TOKENS}",
            ),
            (
                2 * len(self.bad_words) + len(self.bad_words_ids) <= MAX_BAD_WORDS,
                f"bad_words and bad_words_ids make {2 * len(self.bad_words) + len(self.bad_words_ids)} sequences "
                f"(a word makes two, one with a blank before it), expected at most {MAX_BAD_WORDS}",
            ),
            (
                sum(map(len, self.bad_words_ids)) <= MAX_BAD_TOKENS,
                f"bad_words_ids has {sum(map(len, self.bad_words_ids))} tokens, expected at most {MAX_BAD_TOKENS}",
            ),
            (
                self.n * len(self.logit_bias or ()) <= MAX_BIASED,
                f"logit_bias has {len(self.logit_bias or ())} entries for each of n = {shown(self.n)} answers, "
                f"expected at most {MAX_BIASED} together",
            ),
            (
                bias is None,
                f"logit_bias of token {bias} is {shown((self.logit_bias or {}).get(bias or 0))}, "
                "expected values from -100 to 100",
            ),
            *(
                (
                    _in(getattr(self, name), 0, MAX_LOGPROBS),
                    f"{name} is {shown(getattr(self, name))}, expected 0 to {MAX_LOGPROBS}",
                )
                for name in ("logprobs", "prompt_logprobs")
            ),
            (
                sum(bool(getattr(self, name)) for name in _GUIDES) <= 1,
                f"{' and '.join(name for name in _GUIDES if getattr(self, name))} are set, expected at most one guide",
            ),
            (all(self.guided_choice), "guided_choice has an empty string, expected at least one character"),
            (
                self.guide is None or len(self.guide[1]) <= MAX_GUIDE,
                f"a guide is longer than {MAX_GUIDE} characters",
            ),
            *(
                (is_encodable(getattr(self, name)), f"{name} is not valid Unicode: it has a surrogate")
                for name in _TEXTS
            ),
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

    def _normalise(self) -> None:
        """Lists become tuples, one stop string a tuple of one, and textual keys numbers."""
        stop: Any = self.stop
        changed: dict[str, Any] = {name: _tuples(getattr(self, name)) for name in _TUPLES}
        if isinstance(stop, str):
            changed["stop"] = (stop,)
        schema: Any = self.guided_json
        if isinstance(schema, dict):
            changed["guided_json"] = _as_text(schema)
        if isinstance(self.logit_bias, dict):
            changed["logit_bias"] = {_number_of(key): value for key, value in self.logit_bias.items()}
        for name, value in changed.items():
            object.__setattr__(self, name, value)


def _tuples(value: Any, levels: int = 2) -> Any:
    """No option has lists within lists within lists."""
    is_list = levels and isinstance(value, (list, tuple))
    return tuple(_tuples(entry, levels - 1) for entry in value) if is_list else value


def _as_text(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"sampling options: guided_json cannot be written as JSON: {error}") from None


def _number_of(key: Any) -> Any:
    is_short = isinstance(key, str) and len(key) <= len(str(MAX_WHOLE))
    return int(key) if is_short and key.isascii() and key.isdecimal() else key


def _in(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def _sizes(name: str, texts: tuple[str, ...], count: int, length: int) -> list[tuple[bool, str]]:
    longest = max(map(len, texts), default=0)
    return [
        (len(texts) <= count, f"{name} has {len(texts)} entries, expected at most {count}"),
        (longest <= length, f"{name} has a string of {longest} characters, expected at most {length}"),
    ]


_GUIDES = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
_TEXTS = ("stop", "bad_words", *_GUIDES)
_TUPLES = ("stop_token_ids", "stop", "bad_words", "bad_words_ids", "guided_choice")
