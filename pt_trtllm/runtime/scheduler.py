"""Which tokens of which sequences go into the next forward pass, and which blocks of the KV cache they use."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.errors import ConfigError
from pt_trtllm.network.step import SequenceSlice, StepBatch, int64_tensor
from pt_trtllm.runtime.kv_blocks import HeldBlocks
from pt_trtllm.runtime.kv_space import KvSpace
from pt_trtllm.runtime.request import Sequence

POLICIES = ("guaranteed_no_evict", "max_utilization")


@dataclass(frozen=True)
class Share:
    """One sequence's part of a step: tokens that are known, then guesses that may turn out right."""

    sequence: Sequence
    num_tokens: int
    guesses: tuple[int, ...] = ()
    """The last of `num_tokens`; empty but for speculative decoding."""
    num_rows: int = 0
    """Rows of logits, in order: the prompt tokens' that were asked for, then those that decide."""
    num_deciding: int = 0
    """The last rows: the first of them decides the next token, each of the others the one after a guess."""


@dataclass(frozen=True)
class Step:
    """A batch, and whose rows its logits are, in order."""

    batch: StepBatch
    shares: list[Share]


class Scheduler:
    """Sequences join when a slot and blocks are free and leave when they end; long prompts are computed in chunks.

    guaranteed_no_evict   a sequence starts only when its longest possible answer has room: it is never interrupted
    max_utilization       a sequence starts when its next chunk has room; when memory runs out, the youngest of the
                          lowest priority gives its blocks back and is computed again later
    """

    def __init__(self, limits: BuildLimits, space: KvSpace, policy: str = POLICIES[0]) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"scheduler policy is {policy!r}, expected one of {list(POLICIES)}")
        self._limits, self._space, self._may_evict = limits, space, policy == "max_utilization"
        self._free_slots = list(range(limits.max_batch_size))[::-1]
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        """Both by priority, then arrival."""
        self.num_preemptions = 0
        self.num_reused_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Raises when the sequence could not run even alone."""
        missing = self._space.missing_for(sequence.max_length)
        if missing is not None:
            needed, there = missing
            raise ConfigError(
                f"the prompt of {len(sequence.request.prompt_ids)} and up to {sequence.max_new_tokens} new tokens need "
                f"{needed} blocks of {self._space.block_tokens} tokens, the KV cache has {there}; "
                "ask for fewer tokens, or give the cache more memory",
                kind="too_long",
            )
        insort(self._waiting, sequence, key=lambda other: other.order)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence where it is; its slot and blocks are free at once."""
        sequence.finish_reason = "cancelled"
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Of a sequence that ended between two passes."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self.finish_step()

    def decoding(self) -> list[Sequence]:
        """Those that are answering: one known token is left to compute."""
        return [sequence for sequence in self._running if sequence.num_pending == 1 and not sequence.paused]

    def next_step(self) -> Step | None:
        """Running sequences go first (one token each), prompts share what is left of `max_num_tokens`."""
        self._admit()
        budget = self._limits.max_num_tokens
        shares: list[Share] = []
        decoding = self.decoding()
        prompts = [sequence for sequence in self._running if sequence.num_pending > 1 and not sequence.paused]
        # Guesses take what is left after a token for everybody who is answering; half of it where prompts wait.
        spare = (budget - len(decoding)) // (2 if prompts else 1)
        for sequence in decoding:
            if sequence in self._running and self._make_room(sequence, 1, shares):
                guesses = self._room_for_guesses(sequence, spare)
                shares.append(Share(sequence, 1 + len(guesses), guesses))
                spare -= len(guesses)
                budget -= 1 + len(guesses)
        for index, sequence in enumerate(prompts):
            if sequence not in self._running:
                continue  # gave way to an older one
            fair = -(-budget // (len(prompts) - index))  # what the earlier ones leave over goes to the later ones
            count = min(sequence.num_pending, fair)
            if count > 0 and self._make_room(sequence, count, shares):
                shares.append(Share(sequence, count))
                budget -= count
        return self._assemble(shares) if shares else None

    def finish_step(self) -> list[Sequence]:
        """After a pass: offers full blocks to others, frees what ended sequences held; returns those."""
        ended = []
        for sequence in self._running:
            if sequence.error is None:  # what a failed one computed last may be wrong, or more than it has tokens
                self._space.settle(sequence)
            if sequence.finish_reason:
                self._release(sequence)
                ended.append(sequence)
        self._running = [sequence for sequence in self._running if not sequence.finish_reason]
        return ended

    def _admit(self) -> None:
        for sequence in list(self._waiting):
            if not self._free_slots:
                return
            if sequence.paused or self._is_being_computed(sequence):
                continue  # others need not wait for it
            # The last token is always computed: its logits are needed. So are all of them when they were asked for.
            num_known = 0 if sequence.request.wants_prompt_rows else sequence.num_known - 1
            held = self._space.take_prefix(sequence, num_known)
            if not self._fits(sequence, held):
                self._space.release(held)
                return
            self._waiting.remove(sequence)
            sequence.slot = self._free_slots.pop()
            sequence.held = held
            sequence.num_computed = held.num_columns * self._space.block_tokens
            self.num_reused_tokens += sequence.num_computed
            self._running.append(sequence)
            self._running.sort(key=lambda other: other.order)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether another one is at the same prompt: in a few steps its blocks can be shared (parallel samples)."""
        prompt = sequence.request.prompt_ids
        shared = (len(prompt) - 1) // self._space.block_tokens
        return (
            self._space.reuse
            and not sequence.request.wants_prompt_rows
            and any(
                other.held.num_published < shared and other.request.prompt_ids == prompt and not other.paused
                for other in self._running
            )
        )

    def _fits(self, sequence: Sequence, held: HeldBlocks) -> bool:
        if self._may_evict:
            first_chunk = held.num_columns * self._space.block_tokens + self._limits.max_num_tokens
            return self._space.can_grow(held, min(sequence.num_known, first_chunk))
        return self._space.can_promise(self._running, sequence.max_length, held)

    def _room_for_guesses(self, sequence: Sequence, limit: int) -> tuple[int, ...]:
        """As many of its guesses as the step, the answer's length and free memory allow: nobody gives way for them."""
        if not sequence.guesses:
            return ()
        left = sequence.max_new_tokens - len(sequence.output_ids) - 1
        guesses = sequence.guesses[: max(0, min(limit, left))]
        end = sequence.num_computed + 1
        while guesses and not self._space.can_grow(sequence.held, end + len(guesses)):
            guesses = guesses[:-1]
        self._space.grow(sequence.held, end + len(guesses))
        return tuple(guesses)

    def _make_room(self, sequence: Sequence, count: int, shares: list[Share]) -> bool:
        """Gives a sequence blocks for its next tokens; the youngest others give way. False: it gave way itself."""
        end = sequence.num_computed + count
        while not self._space.can_grow(sequence.held, end):
            assert self._may_evict, "blocks were promised and are not there"
            victim = self._running[-1]
            shares[:] = [share for share in shares if share.sequence is not victim]
            self._preempt(victim)
            if victim is sequence:
                return False
        self._space.grow(sequence.held, end)
        return sequence in self._running

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.forget_prompt_rows()
        insort(self._waiting, sequence, key=lambda other: other.order)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._space.release(sequence.held)
        sequence.held = HeldBlocks.none()
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _assemble(self, shares: list[Share]) -> Step:
        tokens: list[int] = []
        slices: list[SequenceSlice] = []
        rows: list[tuple[int, int]] = []
        complete: list[Share] = []
        for share in shares:
            sequence, first, past = share.sequence, len(tokens), share.sequence.num_computed
            held = sequence.held
            known = share.num_tokens - len(share.guesses)
            tokens += [*sequence.known(past, past + known), *share.guesses]
            slices.append(
                SequenceSlice(
                    slot=sequence.slot,
                    num_tokens=share.num_tokens,
                    past=past,
                    first_block=held.num_told,
                    blocks=held.untold(),
                )
            )
            held.num_told = held.num_columns
            asked, deciding = _wanted_rows(sequence, share)
            rows += [(first + offset, top_k) for offset, top_k in asked]
            complete.append(Share(sequence, share.num_tokens, share.guesses, len(asked), deciding))
            sequence.num_computed += share.num_tokens
        batch = StepBatch(
            token_ids=int64_tensor(tokens),
            sequences=tuple(slices),
            logit_rows=int64_tensor([row for row, _ in rows]),
            row_top_k=tuple(top_k for _, top_k in rows),
        )
        return Step(batch, complete)


def _wanted_rows(sequence: Sequence, share: Share) -> tuple[list[tuple[int, int]], int]:
    """([(token of the share, candidates that are enough)] whose logits are wanted, how many of the last decide)."""
    known = share.num_tokens - len(share.guesses)
    rows = []
    if sequence.request.wants_prompt_rows:
        rows = [(offset, 0) for offset in range(min(known, len(sequence.request.prompt_ids) - sequence.num_computed))]
    if known < sequence.num_pending:
        return rows, 0
    first = len(sequence.output_ids)
    deciding = [(known - 1 + index, sequence.num_candidates(first + index)) for index in range(len(share.guesses) + 1)]
    if rows and rows[-1][0] == known - 1:
        deciding[0] = rows.pop()  # the prompt's last token, whose whole row was asked for
    return rows + deciding, len(deciding)
