"""Who owns which block of one pool of the paged KV cache. Rank 0 decides; every rank's pools are numbered alike.

A full block of a prompt is published under a digest of all tokens up to its end. Blocks nobody uses any more stay
published, and may be taken over by a prompt that starts alike, until their memory is needed: then the least recently
used goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = b""
"""The digest before the first block."""


@dataclass
class HeldBlocks:
    """A sequence's block tables, one per group of layers. Column c is for tokens c * block_tokens and up."""

    tables: list[list[int]]
    first: list[int]
    """Per group the first column that is still held."""
    num_told: int = 0
    """Columns the other ranks know of."""
    num_published: int = 0
    """Columns that were offered to others."""

    @classmethod
    def none(cls, num_groups: int = 0) -> HeldBlocks:
        return cls([[] for _ in range(num_groups)], [0] * num_groups)

    @property
    def num_columns(self) -> int:
        return len(self.tables[0])

    def untold(self) -> tuple[tuple[int, ...], ...]:
        """Per group the blocks of the columns that the other ranks do not know of; empty when they know all."""
        return tuple(tuple(table[self.num_told :]) for table in self.tables) if self.num_told < self.num_columns else ()


class BlockManager:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._unused = list(range(num_blocks))[::-1]
        self._users = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published blocks without users, least recently used first."""

    @property
    def num_available(self) -> int:
        """Blocks that can be had now, unused or idle."""
        return len(self._unused) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self) -> int:
        """A block of one's own; the caller has checked `num_available`."""
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            digest = self._digests[block]
            assert digest is not None
            del self._published[digest]
            self._digests[block] = None
        self._users[block] = 1
        return block

    def __contains__(self, digest: bytes) -> bool:
        """Whether a block with this content is published."""
        return digest in self._published

    def take(self, digest: bytes) -> int:
        """One more user for a published block."""
        block = self._published[digest]
        self._users[block] += 1
        self._idle.pop(block, None)
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Offers a full, computed block to others. A second block with the same content stays private."""
        if digest not in self._published:
            self._published[digest] = block
            self._digests[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back; the last of a prefix goes first into the queue of those to be forgotten."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} released twice"
            if self._users[block] == 0:
                if self._digests[block] is None:
                    self._unused.append(block)
                else:
                    self._idle[block] = None

    @staticmethod
    def digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
        return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
