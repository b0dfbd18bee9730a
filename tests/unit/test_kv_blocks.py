"""Blocks neither leak nor alias, whatever the order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.runtime.kv_blocks import ROOT, BlockManager

pytestmark = pytest.mark.unit


def fill(manager: BlockManager, tokens: list[int]) -> list[int]:
    """What a sequence does: reuse what matches, allocate the rest, publish full blocks."""
    blocks = manager.match(tokens)
    while len(blocks) < manager.blocks_for(len(tokens)):
        blocks.append(manager.allocate())
    digest = ROOT
    for index in range(len(tokens) // manager.block_tokens):
        first = index * manager.block_tokens
        digest = manager.digest(digest, tokens[first : first + manager.block_tokens])
        manager.publish(blocks[index], digest)
    return blocks


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
"""Two tokens only: prefixes collide all the time."""


@given(st.lists(st.tuples(st.booleans(), PROMPTS), max_size=40), st.booleans())
def test_blocks_neither_leak_nor_alias(events: list[tuple[bool, list[int]]], reuse: bool) -> None:
    manager = BlockManager(num_blocks=10, block_tokens=2, reuse=reuse)
    held: list[tuple[list[int], list[int]]] = []
    for join, tokens in events:
        if join and manager.num_available >= manager.blocks_for(len(tokens)):
            held.append((tokens, fill(manager, tokens)))
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
    manager = BlockManager(num_blocks=8, block_tokens=2)
    first = fill(manager, [1, 2, 3, 4, 5])
    assert manager.match([1, 2, 3, 4, 9]) == first[:2]
    assert manager.match([1, 2, 9, 4]) == first[:1]
    assert manager.match([2, 1]) == []


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    manager = BlockManager(num_blocks=8, block_tokens=2)
    fill(manager, [1, 2, 3, 4])
    assert len(manager.match([7, 7, 3, 4])) == 0


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    manager = BlockManager(num_blocks=3, block_tokens=1)
    for token in (1, 2, 3):
        manager.release(fill(manager, [token]))
    manager.release(manager.match([1]))  # used again: 2 is now the oldest
    manager.release([manager.allocate()])
    assert (len(manager.match([1])), len(manager.match([2])), len(manager.match([3]))) == (1, 0, 1)


def test_a_prefix_loses_its_end_before_its_beginning() -> None:
    manager = BlockManager(num_blocks=3, block_tokens=1)
    manager.release(fill(manager, [1, 2, 3]))
    manager.allocate()
    assert len(manager.match([1, 2, 3])) == 2


def test_releasing_twice_is_a_bug() -> None:
    manager = BlockManager(num_blocks=1, block_tokens=1)
    block = manager.allocate()
    manager.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        manager.release([block])
