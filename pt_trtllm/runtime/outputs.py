"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pt_trtllm.runtime.logprobs import TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    index: int = 0
    """Of the sample, with n above 1."""
    token_ids: tuple[int, ...]
    """The answer without the prompt; the end token is part of it, and so are the tokens of a stop string."""
    text: str | None
    """None without a tokenizer. While it grows, it only ever gets longer."""
    finish_reason: str | None
    """"stop", "length" or "cancelled"; None while the answer is still growing."""
    stop_reason: int | str | None = None
    """The stop token or stop string of the request that ended the answer; None at the model's own end token."""
    logprobs: tuple[TokenLogprobs, ...] | None = field(default=None, repr=False)
    """One entry per token, when it was asked for."""

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the answer; None unless `logprobs` was asked for."""
        if self.logprobs is None:
            return None
        return sum(row[token].logprob for token, row in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    """One per sample, in order."""
    prompt_logits: torch.Tensor | None = field(default=None, repr=False)
    """float32 [prompt tokens, vocabulary], when it was asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = field(default=None, repr=False)
    """One entry per prompt token, None for the first, when it was asked for."""

    @property
    def finished(self) -> bool:
        return all(output.finish_reason for output in self.outputs)
