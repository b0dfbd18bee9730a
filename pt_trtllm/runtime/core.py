"""Rank 0's engine: requests in, tokens out, one forward pass at a time over all ranks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pt_trtllm.comm.base import Communicator
from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.errors import CommunicationError, EngineError, PtError
from pt_trtllm.mapping import SYNC_KINDS, sync_counts, sync_plan
from pt_trtllm.network.logits import Logits
from pt_trtllm.network.step import StepBatch
from pt_trtllm.runtime.guided import Guides
from pt_trtllm.runtime.messages import STOP, decode, encode
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.rank_log import log_traceback
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.scheduler import Scheduler, Step
from pt_trtllm.runtime.speculative.proposer import Proposer
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.trace import Tracer

T = TypeVar("T")
HELD_UP_S = 0.01
"""Between looks at what has arrived, while all that could be computed wait for their guides."""
NOT_FINITE = (
    "the engine computed logits that are not finite: a weight file was damaged (pt-trtllm inspect --verify "
    "tells), or float16 overflowed (convert with --dtype bfloat16)"
)


class Engine(Protocol):
    """One rank of any backend's engine."""

    config: EngineConfig
    comm: Communicator
    num_passes: int
    """Passes over the network so far; a step may take several."""
    shares_blocks: bool
    """Whether sequences can use the same blocks of the KV cache."""

    def forward(self, batch: StepBatch) -> Logits | None:
        """The logits on rank 0, nothing elsewhere."""
        ...

    def close(self) -> None:
        """Called by every rank when the last step is done."""
        ...


@dataclass
class EngineStats:
    """What the engine did since it started, counted, not assumed."""

    world_size: int
    hosts: int = 1
    forward_passes: int = 0
    sync_points_per_forward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SYNC_KINDS, 0))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses that were computed (speculative decoding)."""
    accepted_tokens: int = 0
    """Those of them that were right."""
    reused_tokens: int = 0
    preemptions: int = 0
    kv_blocks: int = 0
    """Over all groups of layers, as `kv_blocks_used`."""
    kv_blocks_used: int = 0
    kv_blocks_left_behind: int = 0
    """Given back while their sequence went on: no window of its layers reached them any more."""
    running: int = 0
    waiting: int = 0
    seconds: float = 0.0
    """Time in steps, without what is counted as service."""
    seconds_to_first_token: float = 0.0
    """From the first step's start."""
    seconds_in_forward: float = 0.0
    seconds_in_broadcast: float = 0.0
    seconds_in_service: float = 0.0
    """Taking requests, sending tokens."""
    seconds_in_collectives: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class EngineCore:
    """Owns the scheduler and the sequences; `step` advances everything by one pass."""

    def __init__(
        self,
        engine: Engine,
        options: RuntimeOptions,
        tokenizer: Tokenizer | None = None,
        proposer: Proposer | None = None,
        trace: Tracer | None = None,
    ) -> None:
        """Stop strings, bad words and guides need the tokenizer; with a proposer, decoding is speculative."""
        self._proposer = proposer
        self._engine, self.config, self._tokenizer = engine, engine.config, tokenizer
        self._space = options.kv_space(engine.config, shares_blocks=engine.shares_blocks)
        self._scheduler = Scheduler(engine.config.limits, self._space, options.scheduler_policy)
        self._planned = sync_counts(sync_plan(engine.config.checkpoint.model, engine.config.mapping))
        self._guides = Guides(tokenizer, engine.config.checkpoint.model)
        self._held_up: list[Sequence] = []
        """Those whose guide has yet to say what may come next."""
        self._was_finite = False
        self._num_sequences = self._num_steps = 0
        self.trace = trace or Tracer()
        self._stats = EngineStats(
            world_size=engine.comm.world_size, hosts=engine.comm.num_hosts, kv_blocks=self._space.num_blocks
        )

    def add(self, request: Request) -> Sequence:
        """Raises when this engine cannot serve the request."""
        sequence = Sequence.start(self._num_sequences, request, self.config, self._tokenizer, self._guides)
        self._scheduler.add(sequence)
        if sequence.paused:
            self._held_up.append(sequence)
        self._num_sequences += 1
        self._stats.prompt_tokens += len(request.prompt_ids)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        if sequence.finish_reason is None:
            self._scheduler.cancel(sequence)
            self._forget(sequence)

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    @property
    def num_steps(self) -> int:
        """That have been made so far, with those in which all sequences waited for their guides."""
        return self._num_steps

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Sequence]:
        """One pass; returns the sequences that got tokens or ended.

        `meanwhile` is called when the other ranks have begun. What goes wrong with one sequence ends that one alone.
        """
        start, reported = time.perf_counter(), self.trace.seconds["report"]
        self.trace.begin()
        self._num_steps += 1
        ended = self._look_at_guides()
        if self._proposer is not None and (ready := self._scheduler.decoding()):
            self._proposer.propose(ready)
            self.trace.lap("draft")
        step = self._scheduler.next_step()
        if step is None:
            if self._held_up and not ended:
                meanwhile()
                guide = self._held_up[0].sampler.guide
                assert guide is not None
                guide.wait(HELD_UP_S)
            return ended
        message = encode(step.batch)
        self.trace.lap("schedule")
        self._engine.comm.broadcast(message)
        self.trace.lap("broadcast")
        meanwhile()
        self.trace.lap("report")
        logits = self._engine.forward(step.batch)
        self.trace.lap("forward", step.batch.num_tokens)
        stats = self._stats
        stats.forward_passes += 1
        advanced = ended + self._take_tokens(step, logits)
        for sequence in self._scheduler.finish_step():
            self._forget(sequence)
        self.trace.lap("sample")
        stats.seconds += time.perf_counter() - start - (self.trace.seconds["report"] - reported)
        if advanced and not stats.seconds_to_first_token:
            stats.seconds_to_first_token = stats.seconds
        return advanced

    def stats(self) -> EngineStats:
        """The counts so far; raises if the collectives that happened are not the planned ones."""
        stats, comm = self._stats, self._engine.comm.stats
        stats.reused_tokens, stats.preemptions = self._scheduler.num_reused_tokens, self._scheduler.num_preemptions
        stats.kv_blocks_used = self._space.num_used
        stats.kv_blocks_left_behind = self._space.num_left_behind
        stats.running, stats.waiting = self._scheduler.num_running, self._scheduler.num_waiting
        stats.seconds_in_collectives = sum(comm.seconds.values())
        stats.seconds_in_forward, stats.seconds_in_broadcast = (self.trace.seconds[k] for k in ("forward", "broadcast"))
        stats.seconds_in_service = self.trace.seconds["messages"] + self.trace.seconds["report"]
        passes = self._engine.num_passes
        if comm.counts != {kind: count * passes for kind, count in self._planned.items()}:
            raise CommunicationError(
                f"{passes} passes made collectives {comm.counts}; planned per pass: {self._planned}"
            )
        stats.sync_points_per_forward = dict(self._planned) if passes else dict.fromkeys(SYNC_KINDS, 0)
        return stats

    def stop(self) -> None:
        """Releases the other ranks from `follow`."""
        if self._proposer is not None:
            self._proposer.close()
        self._engine.comm.broadcast(STOP)

    def _look_at_guides(self) -> list[Sequence]:
        """Takes up again who was held up by its guide; returns those that ended instead."""
        held_up, self._held_up, ended = self._held_up, [], []
        self._guides.patience.renew()
        for sequence in [one for one in held_up if one.finish_reason is None]:  # the others were cancelled
            self._guarded(sequence, sequence.look_at_guide)
            if sequence.finish_reason is not None:
                ended.append(sequence)
                self._scheduler.drop(sequence)
                self._forget(sequence)
            elif sequence.paused:
                self._held_up.append(sequence)
        return ended

    def _take_tokens(self, step: Step, logits: Logits | None) -> list[Sequence]:
        advanced, at = [], 0
        assert logits is not None
        finite = self._finite_rows(step, logits)
        for share in step.shares:
            sequence, span = share.sequence, slice(at, at + share.num_rows)
            at = span.stop
            take = functools.partial(sequence.take_rows, logits.rows[span], share.num_deciding, share.guesses)
            drawn = 0
            if all(finite[span]):
                drawn = self._guarded(sequence, take) or 0
            else:
                sequence.fail(PtError(NOT_FINITE, kind="failed"))
            if sequence.paused:
                self._held_up.append(sequence)
            if drawn or sequence.error:
                advanced.append(sequence)
            if drawn:
                self._stats.generated_tokens += drawn
                self._stats.drafted_tokens += len(share.guesses)
                self._stats.accepted_tokens += drawn - 1
        return advanced

    def _finite_rows(self, step: Step, logits: Logits) -> list[bool]:
        """Raises when it is the engine that is damaged, and not one prompt that is too much for its numbers."""
        finite = logits.finite_rows()
        asking = sum(share.num_rows > 0 for share in step.shares)
        if finite and not any(finite) and (asking > 1 or not self._was_finite):
            raise EngineError(NOT_FINITE)
        self._was_finite |= any(finite)
        return finite

    def _guarded(self, sequence: Sequence, work: Callable[[], T]) -> T | None:
        """Whatever work for one sequence raises ends that sequence, not the engine."""
        try:
            return work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a Rust library (tokenizer, grammar) is not an Exception
            if not isinstance(error, PtError) or error.kind == "unavailable":
                log_traceback(error)
                error = PtError(
                    f"the engine could not continue this request ({type(error).__name__}); its log has more",
                    kind="failed",
                )
            sequence.fail(error)
            return None

    def _forget(self, sequence: Sequence) -> None:
        if sequence.sampler.guide is not None:
            sequence.sampler.guide.leave()
        if self._proposer is not None:
            self._proposer.forget(sequence)


def follow(engines: SequenceABC[Engine], trace: Tracer | None = None) -> None:
    """Ranks above 0: run what rank 0 announces until it says stop. The first engine is the one that answers."""
    trace = trace or Tracer()
    while (message := decode(engines[0].comm.broadcast(None))) is not None:
        number, batch = message
        trace.lap("broadcast")
        engines[number].forward(batch)
        trace.lap("forward", batch.num_tokens)
