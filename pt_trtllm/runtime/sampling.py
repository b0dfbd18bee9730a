"""From logits to the next token, for one sequence at a time."""

from __future__ import annotations

import math

import torch

from pt_trtllm.runtime.params import SamplingParams

__all__ = ["Sampler", "SamplingParams"]


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
        bias = params.logit_bias or {}
        self._biased = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._output: list[int] = []

    def next_token(self, logits: torch.Tensor, num_generated: int) -> int:
        """logits: float32 [vocabulary]; not changed."""
        params = self.params
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._bias)
        if self._penalised:
            logits = self._penalise(logits)
        banned = [row[-1] for row in params.bad_words_ids if self._ends_with(row[:-1])]
        if num_generated < params.min_tokens:
            banned += self._end_ids
        if banned:
            logits = logits.index_fill(0, torch.tensor(banned), -math.inf)
        token = int(logits.argmax()) if params.is_greedy else self._draw(logits)
        if self._penalised:
            self._seen[token] = True
            self._counts[token] += 1
        if params.bad_words_ids:
            self._output.append(token)
        return token

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        return not tokens or tuple(self._output[-len(tokens) :]) == tokens

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
        # Inverse transform with one draw per token: cheap, and independent of the batch. The draw is scaled by the very
        # sum that is searched, and ends at the last token that can be drawn at all.
        cumulative = probabilities.cumsum(0)
        draw = torch.rand((), generator=self._generator) * cumulative[-1]
        last = int(probabilities.nonzero()[-1])
        return int(tokens[min(int(torch.searchsorted(cumulative, draw, right=True)), last)])
