"""Who owns which block of the paged KV cache. Rank 0 decides; every rank's pools have the same numbering.

A full block of a prompt is published under a digest of all tokens up to its end. Blocks nobody uses any more stay
published, and may be taken over by a prompt that starts alike, until their memory is needed: then the least recently
used goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT = b""
"""The digest before the first block."""


class BlockManager:
    def __init__(self, num_blocks: int, block_tokens: int, *, reuse: bool = True) -> None:
        self.num_blocks, self.block_tokens, self.reuse = num_blocks, block_tokens, reuse
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

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

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

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Takes the published blocks that hold the longest prefix of these tokens, in order."""
        blocks: list[int] = []
        digest = ROOT
        for first in range(0, len(token_ids) - self.block_tokens + 1, self.block_tokens) if self.reuse else ():
            digest = self.digest(digest, token_ids[first : first + self.block_tokens])
            block = self._published.get(digest)
            if block is None:
                break
            self._users[block] += 1
            self._idle.pop(block, None)
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Offers a full, computed block to others. A second block with the same content stays private."""
        if self.reuse and digest not in self._published:
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
