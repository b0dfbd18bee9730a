"""Blocks neither leak nor alias, whatever the order of events."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.runtime.kv_blocks import ROOT, BlockManager

pytestmark = pytest.mark.unit


def digests(tokens: list[int], size: int) -> list[bytes]:
    found = [ROOT]
    for first in range(0, len(tokens) - size + 1, size):
        found.append(BlockManager.digest(found[-1], tokens[first : first + size]))
    return found[1:]


def match(manager: BlockManager, tokens: list[int], size: int) -> list[int]:
    """Takes the blocks of the longest known prefix."""
    return [manager.take(digest) for digest in takewhile(manager.__contains__, digests(tokens, size))]


def fill(manager: BlockManager, tokens: list[int], size: int, *, reuse: bool = True) -> list[int]:
    """What a sequence does: reuse what matches, allocate the rest, publish full blocks."""
    blocks = match(manager, tokens, size) if reuse else []
    while len(blocks) * size < len(tokens):
        blocks.append(manager.allocate())
    for block, digest in zip(blocks, digests(tokens, size), strict=False):
        if reuse:
            manager.publish(block, digest)
    return blocks


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
"""Two tokens only: prefixes collide all the time."""


@given(st.lists(st.tuples(st.booleans(), PROMPTS), max_size=40), st.booleans())
def test_blocks_neither_leak_nor_alias(events: list[tuple[bool, list[int]]], reuse: bool) -> None:
    manager = BlockManager(10)
    held: list[tuple[list[int], list[int]]] = []
    for join, tokens in events:
        if join and manager.num_available >= (len(tokens) + 1) // 2:
            held.append((tokens, fill(manager, tokens, 2, reuse=reuse)))
        elif held:
            manager.release(held.pop(0)[1])
        contents: dict[int, tuple[int, ...]] = {}
        for prompt, blocks in held:
            for index, block in enumerate(blocks):
                content = tuple(prompt[: (index + 1) * 2])
                full = len(content) == (index + 1) * 2
                assert contents.setdefault(block, content) == content, "a block holds two different prefixes"
                assert full or sum(block in other for _, other in held) == 1, "an unfinished block is shared"
        assert manager.num_used == len(contents)
    for _, blocks in held:
        manager.release(blocks)
    assert manager.num_available == 10


def test_a_prompt_that_starts_alike_takes_over_the_blocks() -> None:
    manager = BlockManager(8)
    first = fill(manager, [1, 2, 3, 4, 5], 2)
    assert match(manager, [1, 2, 3, 4, 9], 2) == first[:2]
    assert match(manager, [1, 2, 9, 4], 2) == first[:1]
    assert match(manager, [2, 1], 2) == []


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    manager = BlockManager(8)
    fill(manager, [1, 2, 3, 4], 2)
    assert len(match(manager, [7, 7, 3, 4], 2)) == 0


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    manager = BlockManager(3)
    for token in (1, 2, 3):
        manager.release(fill(manager, [token], 1))
    manager.release(match(manager, [1], 1))  # used again: 2 is now the oldest
    manager.release([manager.allocate()])
    assert (len(match(manager, [1], 1)), len(match(manager, [2], 1)), len(match(manager, [3], 1))) == (1, 0, 1)


def test_a_prefix_loses_its_end_before_its_beginning() -> None:
    manager = BlockManager(3)
    manager.release(fill(manager, [1, 2, 3], 1))
    manager.allocate()
    assert len(match(manager, [1, 2, 3], 1)) == 2


def test_releasing_twice_is_a_bug() -> None:
    manager = BlockManager(1)
    block = manager.allocate()
    manager.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        manager.release([block])
