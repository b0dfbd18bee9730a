"""The KV cache as rank 0 plans it: a pool of blocks per group of layers, and block tables that grow together.

A column of a sequence's tables is one block per group, for the same tokens. Groups of layers with a window give back
the blocks of columns that no token to come will see.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from pt_trtllm.network.kv_groups import KvGroup
from pt_trtllm.runtime.kv_blocks import ROOT, BlockManager, HeldBlocks
from pt_trtllm.runtime.request import Sequence

FREED = -1


class KvSpace:
    def __init__(
        self,
        groups: SequenceABC[KvGroup],
        num_blocks: SequenceABC[int],
        block_tokens: int,
        *,
        step_tokens: int,
        lead: int = 0,
        reuse: bool = True,
    ) -> None:
        """`step_tokens` of all sequences go into a pass; `lead`: tokens a cache is ahead of those that are certain."""
        self.block_tokens, self.reuse = block_tokens, reuse
        self._groups, self._step_tokens, self._lead = tuple(groups), step_tokens, lead
        self._has_windows = any(group.window is not None for group in groups)
        self._pools = [BlockManager(count) for count in num_blocks]
        assert len(self._pools) == len(self._groups)
        self.num_left_behind = 0
        """Blocks given back because they were before every window to come."""

    @property
    def num_blocks(self) -> int:
        """Over all groups."""
        return sum(pool.num_blocks for pool in self._pools)

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self._pools)

    def used(self) -> list[int]:
        """Blocks in use, per group."""
        return [pool.num_used for pool in self._pools]

    def columns(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def missing_for(self, max_length: int) -> tuple[int, int] | None:
        """(blocks that a sequence alone needs, blocks there are) of a group with too few."""
        for group, pool in zip(self._groups, self._pools, strict=True):
            needed = self._most_blocks(group, [self.columns(max_length)])
            if needed > pool.num_blocks:
                return needed, pool.num_blocks
        return None

    def take_prefix(self, sequence: Sequence, num_tokens: int) -> HeldBlocks:
        """The longest published beginning of the first tokens: what its next token sees, in every group."""
        digests = self._digests(sequence, num_tokens // self.block_tokens) if self.reuse else []
        length, runs = 0, [0] * len(self._pools)
        for column, digest in enumerate(digests, start=1):
            runs = [run + 1 if digest in pool else 0 for run, pool in zip(runs, self._pools, strict=True)]
            first = self._first_seen(column * self.block_tokens)
            if all(run >= column - start for run, start in zip(runs, first, strict=True)):
                length = column
            if any(run < column and group.window is None for run, group in zip(runs, self._groups, strict=True)):
                break
        held = HeldBlocks.none(len(self._pools))
        held.num_published, held.first = length, self._first_seen(length * self.block_tokens)
        for table, first_held, pool in zip(held.tables, held.first, self._pools, strict=True):
            table += [FREED] * first_held + [pool.take(digest) for digest in digests[first_held:length]]
        return held

    def can_grow(self, held: HeldBlocks, num_tokens: int) -> bool:
        missing = self.columns(num_tokens) - held.num_columns
        return missing <= 0 or missing <= min(pool.num_available for pool in self._pools)

    def grow(self, held: HeldBlocks, num_tokens: int) -> None:
        """Columns for the first `num_tokens` tokens; the caller has checked `can_grow`."""
        missing = self.columns(num_tokens) - held.num_columns
        if missing <= 0:
            return
        for table, pool in zip(held.tables, self._pools, strict=True):
            table += [pool.allocate() for _ in range(missing)]

    def can_promise(self, running: SequenceABC[Sequence], max_length: int, held: HeldBlocks) -> bool:
        """Whether all of these and a new one that begins with `held` can grow to their longest, come what may."""
        wanted = [(self.columns(other.max_length), other.held.num_columns) for other in running]
        wanted.append((self.columns(max_length), held.num_columns))
        to_come = sum(columns - had for columns, had in wanted)
        return all(
            # Enough if nothing comes back on the way, or for the most that is held at once, nothing shared.
            to_come <= pool.num_available
            or (
                group.window is not None
                and self._most_blocks(group, [columns for columns, _ in wanted]) <= pool.num_blocks
            )
            for group, pool in zip(self._groups, self._pools, strict=True)
        )

    def settle(self, sequence: Sequence) -> None:
        """After a pass: offers full blocks to others, gives back those of wrong guesses and those left behind."""
        held, computed = sequence.held, sequence.num_computed
        certain = min(computed, sequence.num_certain)
        self._publish(sequence, certain // self.block_tokens)
        end = self.columns(computed)
        if held.num_columns > end:
            for table, pool in zip(held.tables, self._pools, strict=True):
                pool.release(table[end:])
                del table[end:]
            held.num_told = min(held.num_told, end)
        if self._has_windows and (first := self._first_seen(certain)) != held.first:
            for table, begin, until, pool in zip(held.tables, held.first, first, self._pools, strict=True):
                pool.release(table[begin:until])
                table[begin:until] = [FREED] * (until - begin)
                self.num_left_behind += until - begin
            held.first = first

    def release(self, held: HeldBlocks) -> None:
        for table, first, pool in zip(held.tables, held.first, self._pools, strict=True):
            pool.release(table[first:])
            table.clear()

    def _publish(self, sequence: Sequence, num_columns: int) -> None:
        held = sequence.held
        if not self.reuse or held.num_published >= num_columns:
            return
        digests = self._digests(sequence, num_columns)
        for column in range(held.num_published, num_columns):
            for table, pool in zip(held.tables, self._pools, strict=True):
                pool.publish(table[column], digests[column])
        held.num_published = num_columns

    def _digests(self, sequence: Sequence, num_columns: int) -> list[bytes]:
        """Of the first columns, each of all tokens up to its end. Tokens that are certain keep theirs."""
        known, size = sequence.digests, self.block_tokens
        if len(known) < num_columns:
            start = len(known) * size
            tokens = sequence.known(start, num_columns * size)
            for at in range(0, len(tokens), size):
                known.append(BlockManager.digest(known[-1] if known else ROOT, tokens[at : at + size]))
        return known[:num_columns]

    def _first_seen(self, num_computed: int) -> list[int]:
        return [group.first_seen(num_computed, self.block_tokens) for group in self._groups]

    def _most_blocks(self, group: KvGroup, columns: SequenceABC[int]) -> int:
        return group.most_blocks(columns, self.block_tokens, self._step_tokens, self._lead)
