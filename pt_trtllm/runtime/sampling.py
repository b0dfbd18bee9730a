"""From logits to the next token, for one sequence at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pt_trtllm.config import problems_to_error

GREEDY_TEMPERATURE = 1e-5
"""Below this, sampling is as good as greedy and would only overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; names and meanings are vLLM's and TensorRT-LLM's. Unset options mean greedy."""

    max_tokens: int = 64
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
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}, expected at least 1"),
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
        ]
        problems_to_error("sampling options", [message for valid, message in checks if not valid])

    @property
    def is_greedy(self) -> bool:
        if self.top_k == 1:
            return True
        if self.temperature is None:
            return not self.top_k and self.top_p is None and self.min_p is None
        return self.temperature < GREEDY_TEMPERATURE


class Sampler:
    """Draws the tokens of one sequence; keeps its random state and the counts its penalties need."""

    def __init__(self, params: SamplingParams, prompt_ids: list[int], vocab_size: int, end_ids: frozenset[int]) -> None:
        self.params = params
        self._end_ids = sorted(token for token in end_ids if token < vocab_size)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            # manual_seed takes a signed range only
            self._generator.manual_seed(params.seed - (1 << 64) if params.seed >= 1 << 63 else params.seed)
        self._penalised = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        if self._penalised:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[prompt_ids] = True
            self._counts = torch.zeros(vocab_size)

    def next_token(self, logits: torch.Tensor, num_generated: int) -> int:
        """logits: float32 [vocabulary]; not changed."""
        params = self.params
        if self._penalised:
            logits = self._penalise(logits)
        if num_generated < params.min_tokens and self._end_ids:
            logits = logits.index_fill(0, torch.tensor(self._end_ids), -math.inf)
        token = int(logits.argmax()) if params.is_greedy else self._draw(logits)
        if self._penalised:
            self._seen[token] = True
            self._counts[token] += 1
        return token

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        params = self.params
        factor = torch.where(logits > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits = torch.where(self._seen, logits * factor, logits)
        return logits - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)

    def _draw(self, logits: torch.Tensor) -> int:
        params = self.params
        logits = logits / (1.0 if params.temperature is None else params.temperature)
        values, tokens = logits.topk(min(params.top_k, len(logits))) if params.top_k else logits.sort(descending=True)
        probabilities = values.softmax(dim=0)
        keep = torch.ones(len(values), dtype=torch.bool)
        if params.top_p is not None:
            keep &= probabilities.cumsum(0) - probabilities < params.top_p  # the first token past the limit stays
        if params.min_p is not None:
            keep &= probabilities >= params.min_p * probabilities[0]
        probabilities = probabilities * keep
        # Inverse transform with one draw per token: cheap, and independent of the batch.
        draw = torch.rand((), generator=self._generator) * probabilities.sum()
        index = int(torch.searchsorted(probabilities.cumsum(0), draw, right=True).clamp_max(int(keep.sum()) - 1))
        return int(tokens[index])


def _in(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high
