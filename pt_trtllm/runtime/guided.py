"""Guided decoding: only tokens that keep the answer inside a JSON schema, a regular expression, a grammar or a choice.

The grammars are llguidance's, imported only where a request is guided. What clients write into a grammar decides how
long its work takes, so threads do it: the engine waits for a grammar no longer than its patience lasts, and goes on
without a sequence whose grammar needs more.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import Future, wait
from typing import Any

import torch

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.runtime.params import MAX_SAMPLES, SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.runtime.workers import Workers

ONE_LINE = {"whitespace_flexible": False}
"""JSON without blanks of the model's own: where any number of them is allowed, small models write nothing else."""
STACK_BYTES = 1 << 30
"""llguidance descends as deep as rules refer to each other: 28,000 levels are possible in the longest grammar and need
more than 64 MiB. Memory that is not used costs nothing."""
LIMITS = {"step_max_items": 10_000, "max_lexer_states": 50_000, "verbose_errors": False}
"""Of one grammar: Earley items per token (some 20 ms), and states of its lexer (2 kB each)."""
STEP_PATIENCE_S, GUIDE_PATIENCE_S = 0.02, 0.002
"""How long a step waits for all grammars, and for one. Usual ones take 0.1 ms."""


class Patience:
    """What is left of a step's time for waiting."""

    def __init__(self) -> None:
        self.left_s = STEP_PATIENCE_S

    def renew(self) -> None:
        self.left_s = STEP_PATIENCE_S

    def wait(self, job: Future[Any]) -> bool:
        """Whether the job is done now."""
        if not job.done():
            start = time.perf_counter()
            wait([job], max(0.0, min(self.left_s, GUIDE_PATIENCE_S)))
            self.left_s -= time.perf_counter() - start
        return job.done()


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, workers: Workers, patience: Patience, start: Future[tuple[Any, torch.Tensor | None]]) -> None:
        self._workers, self._patience, self._job = workers, patience, start

    def is_ready(self, *, patient: bool = False) -> bool:
        """Whether what may come next is known."""
        return self._patience.wait(self._job) if patient else self._job.done()

    def wait(self, timeout_s: float) -> None:
        """For what may come next to be known."""
        wait([self._job], timeout_s)

    def leave(self) -> None:
        """Nobody waits any more: what has not begun need not."""
        self._job.cancel()

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """logits with minus infinity for tokens that must not follow; it is not changed. Waits until they are known."""
        _, allowed = self._settled()
        return logits if allowed is None else logits.masked_fill(~allowed[: len(logits)], -math.inf)

    def accept(self, token: int) -> None:
        matcher, _ = self._settled()

        def follow() -> tuple[Any, torch.Tensor | None]:
            matcher.consume_token(token)
            return matcher, _allowed(matcher)

        self._job = self._workers.submit(follow)

    @property
    def complete(self) -> bool:
        """Nothing may follow any more. Raises when the grammar is wrong, or nobody can follow it further."""
        return self._settled()[1] is None

    def _settled(self) -> tuple[Any, torch.Tensor | None]:
        try:
            return self._job.result()
        except PtError as error:
            raise error.with_traceback(None) from None
        except BaseException as error:
            raise PtError(f"the grammar cannot be followed: {type(error).__name__}", kind="failed") from error


class Guides:
    """Makes the guides of an engine's requests."""

    def __init__(self, tokenizer: Tokenizer | None, model: ModelConfig) -> None:
        self._tokenizer, self._model = tokenizer, model
        self.patience = Patience()
        self._backend: Any = None
        """llguidance's view of the vocabulary, made when it is first needed."""
        self._compilers = Workers("pt-trtllm-grammar", 1, stack_bytes=STACK_BYTES, niceness=10)
        self._maskers = Workers("pt-trtllm-masks", min(4, len(os.sched_getaffinity(0))), stack_bytes=STACK_BYTES)
        self._latest: tuple[tuple[str, str], Any, int] | None = None
        """A grammar, its matcher, and for how many more it serves: parallel samples follow the same one. What a copy
        learns of the grammar is kept for all copies and counts for their limits, so that it may not serve for ever."""

    def make(self, params: SamplingParams) -> Guide | None:
        """None where the request is free. Whether the grammar is well-formed is known when the guide is ready."""
        asked = params.guide
        if asked is None:
            return None
        if self._tokenizer is None:
            raise ConfigError("guided decoding needs a tokenizer, and this engine came without one")
        return Guide(self._maskers, self.patience, self._compilers.submit(lambda: self._start(*asked)))

    def _start(self, name: str, text: str) -> tuple[Any, torch.Tensor | None]:
        """For a compiler's thread."""
        if self._latest is None or self._latest[0] != (name, text) or not self._latest[2]:
            self._latest = None
            self._latest = (name, text), self._compile(name, text), MAX_SAMPLES
        key, original, left = self._latest
        self._latest = key, original, left - 1
        matcher = original.deep_copy()
        return matcher, _allowed(matcher)

    def _compile(self, name: str, text: str) -> Any:
        import llguidance

        try:
            if name == "guided_json":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=ONE_LINE)
            else:
                grammar = llguidance.grammar_from(name.removeprefix("guided_"), text)
            limits = llguidance.LLParserLimits(**LIMITS)
            matcher = llguidance.LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise ConfigError(f"{name} is not valid: {_first_line(str(error))}") from None
        if matcher.is_error():
            raise ConfigError(f"{name} is not valid: {_first_line(matcher.get_error())}")
        return matcher

    def _vocabulary(self) -> Any:
        import llguidance

        assert self._tokenizer is not None
        if self._backend is None:
            ends = [token for token in self._model.eos_token_id if token < self._model.vocab_size]
            self._backend = llguidance.LLTokenizer(
                self._tokenizer.to_json(), n_vocab=self._model.vocab_size, eos_token=ends or None
            )
        return self._backend


def _allowed(matcher: Any) -> torch.Tensor | None:
    """Which tokens may follow; None when the grammar is complete. Raises when it cannot be followed further."""
    allowed = None
    if not matcher.is_stopped():
        allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) != 0
    if matcher.is_error():
        raise ConfigError(f"the grammar is too ambiguous to follow: {_first_line(matcher.get_error())}; simplify it")
    if allowed is not None and not bool(allowed.any()):
        if matcher.is_stopped():
            return None
        raise PtError("no token of the vocabulary continues the grammar", kind="failed")
    return allowed


def _first_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
