"""A draft engine's guesses: every sequence has a mirror that runs ahead of it.

A mirror draws with the same options and the same random numbers as its sequence, so that both agree wherever their
models do. It knows what was decided, continues on its own, and goes back to where it was wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.errors import PtError
from pt_trtllm.network.logits import Logits
from pt_trtllm.network.step import StepBatch
from pt_trtllm.runtime.kv_space import KvSpace
from pt_trtllm.runtime.rank_log import log_traceback
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import Sampler
from pt_trtllm.runtime.scheduler import Scheduler

Forward = Callable[[StepBatch], Logits]


@dataclass(eq=False)
class Mirror:
    sequence: Sequence
    decided: Sampler
    """In the state behind the decided tokens."""
    num_decided: int = 0
    """Tokens of the answer that are not guesses."""

    @property
    def guesses(self) -> list[int]:
        return self.sequence.output_ids[self.num_decided :]

    @property
    def room(self) -> int:
        """Tokens that the draft engine could still add."""
        return self.sequence.max_new_tokens - len(self.sequence.output_ids)


class DraftModel:
    """Runs the draft engine for any number of mirrors. `forward` makes one pass over the draft's ranks."""

    def __init__(self, config: EngineConfig, space: KvSpace, forward: Forward) -> None:
        """`space` has room for mirrors that lead by as many tokens as `advance` is asked for."""
        self._config, self._forward = config, forward
        self._scheduler = Scheduler(config.limits, space)
        self._num_mirrors = 0

    def start(self, request: Request, seed: int) -> Mirror | None:
        """None where the draft engine cannot hold so long a sequence."""
        # Without the guide: what it forbids is a guess that turns out wrong.
        params = dataclasses.replace(
            request.params, seed=seed, stop=(), bad_words=(), logprobs=None, prompt_logprobs=None, n=1
        ).without_guide()
        if len(request.prompt_ids) >= min(self._config.limits.max_seq_len, self._config.limits.max_input_len + 1):
            return None
        own = Request(prompt_ids=request.prompt_ids, params=params)
        try:
            sequence = Sequence.start(self._num_mirrors, own, self._config)
            self._scheduler.add(sequence)
        except PtError:
            return None
        self._num_mirrors += 1
        mirror = Mirror(sequence, sequence.sampler)
        sequence.sampler = mirror.decided.fork()
        sequence.num_certain = len(own.prompt_ids)
        return mirror

    def decide(self, mirror: Mirror, tokens: list[int]) -> None:
        """These follow what was decided before. Guesses that agree are kept, with all that follow them."""
        sequence, guesses = mirror.sequence, mirror.guesses
        agreed = 0
        while agreed < min(len(tokens), len(guesses)) and tokens[agreed] == guesses[agreed]:
            agreed += 1
        for token in tokens:
            mirror.decided.observe(token)
        past = len(sequence.request.prompt_ids) + mirror.num_decided
        mirror.num_decided += len(tokens)
        sequence.num_certain = past + len(tokens)
        if agreed < len(tokens):  # beyond this, nothing of what was guessed is of use
            del sequence.output_ids[mirror.num_decided - len(tokens) + agreed :]
            sequence.output_ids += tokens[agreed:]
            sequence.num_computed = min(sequence.num_computed, past + agreed)
            sequence.sampler = mirror.decided.fork()

    def advance(self, mirrors: list[Mirror], lead: int) -> list[Mirror]:
        """One pass for those with less than `lead` guesses; returns who got one. Empty: nobody can."""
        for mirror in mirrors:
            sequence = mirror.sequence
            sequence.paused = len(mirror.guesses) >= lead or mirror.room <= 0 or sequence.finish_reason is not None
        if all(mirror.sequence.paused for mirror in mirrors):
            return []
        while (step := self._scheduler.next_step()) is not None:
            logits, at, advanced = self._forward(step.batch), 0, set()
            finite = logits.finite_rows()
            for share in step.shares:
                sequence, at = share.sequence, at + share.num_rows
                for row in range(at - share.num_deciding, at):
                    try:
                        if not finite[row]:
                            raise PtError("the draft engine's logits are not finite")
                        token = sequence.sampler.next_token(logits.rows[row], len(sequence.output_ids))
                    except Exception as error:  # its answer goes on without guesses
                        log_traceback(error)
                        sequence.fail(PtError(str(error)))
                        break
                    sequence.output_ids.append(token)
                    advanced.add(sequence)
            self._scheduler.finish_step()
            if advanced:
                return [mirror for mirror in mirrors if mirror.sequence in advanced]
        return []

    def end(self, mirror: Mirror) -> None:
        self._scheduler.cancel(mirror.sequence)
