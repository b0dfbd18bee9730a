"""A prompt on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.sampling import Sampler, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    context_logits: bool = False
    """Keep the logits of every prompt token."""

    def check(self, config: EngineConfig, label: str) -> None:
        """Raises when this engine cannot serve the request."""
        limits, vocab_size = config.limits, config.checkpoint.model.vocab_size
        length = len(self.prompt_ids)
        if length == 0:
            raise ConfigError(f"{label}: the prompt is empty; expected at least one token")
        bad = next((token for token in self.prompt_ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ConfigError(f"{label}: token id {bad} is outside the vocabulary of {vocab_size}")
        if length > limits.max_input_len:
            raise ConfigError(
                f"{label}: Prompt length ({length}) exceeds maximum input length ({limits.max_input_len}); "
                "shorten it, or build with a larger --max-input-len / --max-seq-len"
            )


@dataclass(eq=False)
class Sequence:
    """A request being computed: what is cached, what was generated, and where."""

    index: int
    """Order of arrival."""
    request: Request
    sampler: Sampler
    end_ids: frozenset[int]
    max_new_tokens: int
    """Limited by the request and by the room the prompt leaves in max_seq_len."""
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logits: list[torch.Tensor] = field(default_factory=list)

    # The scheduler's book-keeping.
    slot: int = -1
    num_computed: int = 0
    """Tokens in the cache."""
    blocks: list[int] = field(default_factory=list)
    num_told_blocks: int = 0
    """Blocks the other ranks know of."""
    num_published: int = 0
    """Tokens in blocks that were offered to others."""
    digest: bytes = b""
    """Of the published tokens."""

    @classmethod
    def start(cls, index: int, request: Request, config: EngineConfig) -> Sequence:
        model, params = config.checkpoint.model, request.params
        end_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(model.eos_token_id)
        )
        return cls(
            index=index,
            request=request,
            sampler=Sampler(params, list(request.prompt_ids), model.vocab_size, end_ids),
            end_ids=end_ids,
            max_new_tokens=min(params.max_tokens, config.limits.max_seq_len - len(request.prompt_ids)),
        )

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.output_ids]

    def known(self, first: int, end: int) -> list[int]:
        """Tokens [first, end) of prompt and answer, without building the whole list while decoding."""
        past = len(self.request.prompt_ids)
        return self.output_ids[first - past : end - past] if first >= past else self.token_ids[first:end]

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.request.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def max_length(self) -> int:
        """Tokens that the cache may have to hold: the last generated one is never computed."""
        return len(self.request.prompt_ids) + self.max_new_tokens - 1

    def accept(self, token: int) -> None:
        """Adds a sampled token. The end token itself is part of the output, as in TensorRT-LLM."""
        self.output_ids.append(token)
        if token in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
