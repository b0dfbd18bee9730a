"""From logits to the next token, for one sequence at a time."""

from __future__ import annotations

import copy
import math

import torch

from pt_trtllm.network.logits import MAX_CANDIDATES, Candidates, Row, most_likely
from pt_trtllm.runtime.guided import Guide
from pt_trtllm.runtime.params import SamplingParams

__all__ = ["Sampler", "SamplingParams"]


class Sampler:
    """Draws the tokens of one sequence; keeps its random state and the counts its penalties need."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        vocab_size: int,
        end_ids: frozenset[int],
        guide: Guide | None = None,
    ) -> None:
        self.params, self.guide = params, guide
        self._end_ids = sorted(token for token in end_ids if 0 <= token < vocab_size)
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
        self._changes_logits = bool(bias or self._penalised or params.bad_words_ids or guide is not None)
        self._biased = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._output: list[int] = []

    def num_candidates(self, num_generated: int) -> int:
        """How many of the most likely tokens are enough to draw the next one; 0: the whole row is needed."""
        params = self.params
        if self._changes_logits or (num_generated < params.min_tokens and self._end_ids):
            return 0
        count = 1 if params.is_greedy else params.top_k or 0
        return count if count <= MAX_CANDIDATES else 0

    def next_token(self, logits: Row, num_generated: int) -> int:
        """logits: not changed; candidates only where `num_candidates` said so."""
        params = self.params
        if isinstance(logits, int):
            return logits
        if isinstance(logits, Candidates):
            return logits.first if params.is_greedy else self._draw(logits)
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._bias)
        if self._penalised:
            logits = self._penalise(logits)
        banned = [row[-1] for row in params.bad_words_ids if self._ends_with(row[:-1])]
        if num_generated < params.min_tokens:
            banned += self._end_ids
        allowed = logits if self.guide is None else self.guide.mask(logits)
        if banned:
            logits = allowed.index_fill(0, torch.tensor(banned), -math.inf)
            if self.guide is not None and bool(logits.isneginf().all()):
                logits = allowed  # bans that contradict the guide give way to it
        else:
            logits = allowed
        token = int(logits.argmax()) if params.is_greedy else self._draw(logits)
        self._note(token)
        return token

    @property
    def seed(self) -> int:
        """The one that was given, or drawn."""
        return self._generator.initial_seed() % (1 << 64)

    def observe(self, token: int) -> None:
        """As if the token had been drawn here: another sampler with this one's seed drew it."""
        if not self.params.is_greedy:
            torch.rand((), generator=self._generator)
        self._note(token)

    def fork(self) -> Sampler:
        """Another one in the same state, which will draw the same from the same logits."""
        other = copy.copy(self)
        other._generator = self._generator.clone_state()
        other._output = list(self._output)
        if self._penalised:
            other._seen, other._counts = self._seen.clone(), self._counts.clone()
        assert self.guide is None, "what guesses does without: a guess that a guide forbids turns out wrong"
        return other

    def _note(self, token: int) -> None:
        if self._penalised:
            self._seen[token] = True
            self._counts[token] += 1
        if self.params.bad_words_ids:
            self._output.append(token)
        if self.guide is not None:
            self.guide.accept(token)

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        return not tokens or tuple(self._output[-len(tokens) :]) == tokens

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        params = self.params
        factor = torch.where(logits > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits = torch.where(self._seen, logits * factor, logits)
        return logits - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)

    def _draw(self, logits: torch.Tensor | Candidates) -> int:
        params = self.params
        if isinstance(logits, Candidates):
            values, tokens = logits.values[: params.top_k], logits.tokens[: params.top_k]
        elif params.top_k and params.top_k < len(logits):
            values, tokens = (found[0] for found in most_likely(logits[None], params.top_k))
        else:
            values, tokens = logits.sort(descending=True, stable=True)
        probabilities = (values / (1.0 if params.temperature is None else params.temperature)).softmax(dim=0)
        keep = torch.ones(len(values), dtype=torch.bool)
        if params.top_p is not None:
            keep &= probabilities.cumsum(0) - probabilities < params.top_p  # the first token past the limit stays
        if params.min_p is not None:
            keep &= probabilities >= params.min_p * probabilities[0]
        keep[0] = True  # a limit that float32 rounds to 0 would leave none
        probabilities = probabilities * keep
        # Inverse transform with one draw per token: cheap, and independent of the batch. The draw is scaled by the very
        # sum that is searched, and ends at the last token that can be drawn at all.
        cumulative = probabilities.cumsum(0)
        draw = torch.rand((), generator=self._generator) * cumulative[-1]
        last = int(probabilities.nonzero()[-1])
        return int(tokens[min(int(torch.searchsorted(cumulative, draw, right=True)), last)])
