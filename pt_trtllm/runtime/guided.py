"""Guided decoding: only tokens that keep the answer inside a JSON schema, a regular expression, a grammar or a choice.

The grammars are llguidance's. Imported only where a request is guided.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer

ONE_LINE = {"whitespace_flexible": False}
"""JSON without blanks of the model's own: where any number of them is allowed, small models write nothing else."""


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """logits with minus infinity for tokens that must not follow; it is not changed."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return logits.masked_fill(allowed[: len(logits)] == 0, -math.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    def fork(self) -> Guide:
        return Guide(self._matcher.deep_copy())


class Guides:
    """Makes the guides of an engine's requests."""

    def __init__(self, tokenizer: Tokenizer | None, model: ModelConfig) -> None:
        self._tokenizer, self._model = tokenizer, model
        self._backend: Any = None
        """llguidance's view of the vocabulary, made when it is first needed."""

    def make(self, params: SamplingParams) -> Guide | None:
        """None where the request is free. Raises when its grammar is malformed."""
        asked = params.guide
        if asked is None:
            return None
        import llguidance

        name, text = asked
        try:
            if name == "guided_json":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=ONE_LINE)
            else:
                grammar = llguidance.grammar_from(name.removeprefix("guided_"), text)
            matcher = llguidance.LLMatcher(self._vocabulary(), grammar, log_level=0)
        except ValueError as error:
            raise ConfigError(f"{name} is not valid: {_first_line(str(error))}") from None
        if matcher.is_error():
            raise ConfigError(f"{name} is not valid: {_first_line(matcher.get_error())}")
        return Guide(matcher)

    def _vocabulary(self) -> Any:
        import llguidance

        if self._tokenizer is None:
            raise ConfigError("guided decoding needs a tokenizer, and this engine came without one")
        if self._backend is None:
            ends = [token for token in self._model.eos_token_id if token < self._model.vocab_size]
            self._backend = llguidance.LLTokenizer(
                self._tokenizer.to_json(), n_vocab=self._model.vocab_size, eos_token=ends or None
            )
        return self._backend


def _first_line(message: str) -> str:
    return " ".join(message.split())[:300]
