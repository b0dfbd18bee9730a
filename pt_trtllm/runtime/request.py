"""A prompt on its way to an answer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import torch

from pt_trtllm.config import shown
from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.network.logits import Row
from pt_trtllm.runtime.detokenize import AnswerText
from pt_trtllm.runtime.guided import Guides
from pt_trtllm.runtime.kv_blocks import HeldBlocks
from pt_trtllm.runtime.logprobs import LogprobRow, top_logprobs
from pt_trtllm.runtime.sampling import Sampler, SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.runtime.values import is_number, is_whole


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    context_logits: bool = False
    """Keep the logits of every prompt token."""
    priority: float = 0.5
    """0 to 1: a request starts before those of lower priority, and gives way after them."""

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether the logits of prompt tokens are needed, not only the last one's."""
        return self.context_logits or self.params.prompt_logprobs is not None

    def with_token_bans(self, tokenizer: Tokenizer | None, label: str) -> Request:
        """With `bad_words` as tokens. Raises when an option needs the tokenizer that is not there."""
        params = self.params
        if tokenizer is None:
            needing = [name for name in ("stop", "bad_words") if getattr(params, name)]
            needing += [params.guide[0]] if params.guide else []
            if needing:
                raise ConfigError(
                    f"{label}: {' and '.join(needing)} need a tokenizer, and this engine came without one"
                )
            return self
        if not params.bad_words:
            return self
        spellings = [start + word.lstrip() for word in params.bad_words for start in ("", " ")]
        encoded = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in spellings]
        banned = dict.fromkeys([*params.bad_words_ids, *(row for row in encoded if row)])
        return dataclasses.replace(self, params=dataclasses.replace(params, bad_words=(), bad_words_ids=tuple(banned)))

    def check(self, config: EngineConfig, label: str) -> None:
        """Raises when this engine cannot serve the request."""
        if not is_number(self.priority) or not 0 <= self.priority <= 1:
            raise ConfigError(f"{label}: priority is {shown(self.priority)}, expected 0 to 1")
        limits, vocab_size = config.limits, config.checkpoint.model.vocab_size
        length = len(self.prompt_ids)
        if length == 0:
            raise ConfigError(f"{label}: the prompt is empty; expected at least one token")
        # Almost all are fine, and prompts are long: rank 0 does this between two steps.
        for token in [token for token in self.prompt_ids if type(token) is not int or not 0 <= token < vocab_size]:
            if not is_whole(token):
                raise ConfigError(f"{label}: the prompt has {shown(token)}, expected token ids")
            if not 0 <= token < vocab_size:
                raise ConfigError(f"{label}: token id {shown(token)} is outside the vocabulary of {vocab_size}")
        params = self.params
        for name, tokens in {
            "logit_bias": params.logit_bias or {},
            "bad_words_ids": [token for row in params.bad_words_ids for token in row],
        }.items():
            bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
            if bad is not None:
                raise ConfigError(f"{label}: {name} has token id {bad}, outside the vocabulary of {vocab_size}")
        never = {row[-1] for row in params.bad_words_ids} | set(config.checkpoint.model.eos_token_id)
        if len(never | set(params.stop_token_ids)) >= vocab_size:
            raise ConfigError(f"{label}: bad_words_ids may leave no token of the vocabulary of {vocab_size}")
        if length > limits.max_input_len:
            raise ConfigError(
                f"{label}: Prompt length ({length}) exceeds maximum input length ({limits.max_input_len}); "
                "shorten it, or build with a larger --max-input-len / --max-seq-len",
                kind="too_long",
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
    error: PtError | None = None
    """Why it could not go on; `finish_reason` is then "error"."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended the answer, where one of the request's own did."""
    prompt_logits: list[torch.Tensor] = field(default_factory=list)
    prompt_logprobs: list[LogprobRow] = field(default_factory=list)
    """Of the prompt's tokens from the second on."""
    logprobs: list[LogprobRow] = field(default_factory=list)
    num_reported: int = 0
    """Tokens of the answer that the client was told."""
    answer: AnswerText | None = None
    """Where stop strings are to be found."""

    # The scheduler's book-keeping.
    slot: int = -1
    num_computed: int = 0
    """Tokens in the cache."""
    held: HeldBlocks = field(default_factory=HeldBlocks.none)
    digests: list[bytes] = field(default_factory=list)
    """Of the first columns of blocks, as far as they were needed."""
    guesses: list[int] = field(default_factory=list)
    """What may follow the known tokens: computed together with them, and kept as far as they turn out right."""
    paused: bool = False
    """Left out of steps."""
    num_certain: int = sys.maxsize
    """Tokens from here on may change, and are not offered to others."""

    @classmethod
    def start(
        cls,
        index: int,
        request: Request,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        guides: Guides | None = None,
    ) -> Sequence:
        """Raises when this engine cannot serve the request."""
        request = request.with_token_bans(tokenizer, "request")
        request.check(config, "request")
        model, params = config.checkpoint.model, request.params
        end_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(model.eos_token_id)
        )
        guide = guides.make(params) if guides else None
        return cls(
            index=index,
            request=request,
            sampler=Sampler(params, list(request.prompt_ids), model.vocab_size, end_ids, guide),
            paused=guide is not None,
            end_ids=end_ids,
            max_new_tokens=min(params.max_tokens, config.limits.max_seq_len - len(request.prompt_ids)),
            answer=AnswerText.of(tokenizer, params, request.prompt_ids) if tokenizer and params.stop else None,
        )

    @property
    def order(self) -> tuple[float, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return -self.request.priority, self.index

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.output_ids]

    def known(self, first: int, end: int) -> list[int]:
        """Tokens [first, end) of prompt and answer, without building the whole list while decoding."""
        past = len(self.request.prompt_ids)
        return self.output_ids[first - past : end - past] if first >= past else self.token_ids[first:end]

    @property
    def num_known(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that are not computed yet."""
        return self.num_known - self.num_computed

    @property
    def max_length(self) -> int:
        """Tokens that the cache may have to hold: the last generated one is never computed."""
        return len(self.request.prompt_ids) + self.max_new_tokens - 1

    def num_candidates(self, num_generated: int) -> int:
        """How many of the most likely tokens are enough for the answer's next one; 0: the whole row of logits."""
        return 0 if self.request.params.logprobs is not None else self.sampler.num_candidates(num_generated)

    def take_rows(self, rows: SequenceABC[Row], num_deciding: int, guesses: tuple[int, ...] = ()) -> int:
        """Uses a step's logits: those of the prompt as asked for, the last ones to draw tokens. Returns how many.

        Every token is drawn as without guesses; a guess only makes its successor's logits known in the same step. The
        first that was wrong ends the step, and what was computed from it on is forgotten. So does a guide that does not
        know yet what may come next.
        """
        first_deciding = len(rows) - num_deciding
        for index, row in enumerate(rows[: first_deciding + min(1, num_deciding)]):
            self._keep_prompt_row(row, is_last=index >= first_deciding)
        drawn = 0
        for row in rows[first_deciding:]:
            self._draw(row)
            drawn += 1
            is_last = self.finish_reason or self.paused or drawn == num_deciding
            if is_last or self.output_ids[-1] != guesses[drawn - 1]:
                break
        self.num_computed -= max(0, num_deciding - drawn)
        return drawn

    def _keep_prompt_row(self, row: Row, *, is_last: bool) -> None:
        prompt, params = self.request.prompt_ids, self.request.params
        if not self.request.wants_prompt_rows or (is_last and self.output_ids):
            return
        assert isinstance(row, torch.Tensor)
        if self.request.context_logits and len(self.prompt_logits) < len(prompt):
            self.prompt_logits.append(row.clone())
        if params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(prompt) - 1:
            following = prompt[len(self.prompt_logprobs) + 1]
            self.prompt_logprobs.append(top_logprobs(row, following, params.prompt_logprobs))

    def _draw(self, row: Row) -> None:
        params = self.request.params
        token = self.sampler.next_token(row, len(self.output_ids))
        if params.logprobs is not None:
            assert isinstance(row, torch.Tensor)
            self.logprobs.append(top_logprobs(row, token, params.logprobs))
        self.accept(token)

    def forget_prompt_rows(self) -> None:
        """Before the prompt is computed again."""
        self.prompt_logits.clear()
        self.prompt_logprobs.clear()

    def accept(self, token: int) -> None:
        """Adds a sampled token. The end token itself is part of the output, as in TensorRT-LLM."""
        self.output_ids.append(token)
        stopped = self.answer is not None and self.answer.add(token)
        if token in self.request.params.stop_token_ids:
            self.stop_reason = token
        if stopped or token in self.end_ids:
            self._finish("stop")
        elif self.sampler.guide is not None:
            self.paused = True
            self.look_at_guide(patient=True)
        elif len(self.output_ids) >= self.max_new_tokens:
            self._finish("length")

    def look_at_guide(self, *, patient: bool = False) -> None:
        """Goes on, or ends, where its guide knows by now what may come next. Raises when the guide failed."""
        guide = self.sampler.guide
        assert guide is not None
        if not guide.is_ready(patient=patient):
            return
        self.paused = False
        if guide.complete:
            self._finish("stop")
        elif len(self.output_ids) >= self.max_new_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        if reason == "length" and self.answer is not None and self.answer.finish():
            reason = "stop"
        self.finish_reason = reason
        if self.answer is not None and self.answer.stop_string is not None:
            self.stop_reason = self.answer.stop_string

    def fail(self, error: PtError) -> None:
        self.error, self.finish_reason = error, "error"
