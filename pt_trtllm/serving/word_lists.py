"""TensorRT-LLM's layout of word lists: int32 [prompts, 2, n].

Row 0 has the ids of all words end to end, row 1 the end offset of each word; both are padded, row 1 with -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pt_trtllm.errors import ConfigError


def pack_words(rows: Sequence[Sequence[Sequence[int]]]) -> Any:
    """Words of each prompt, as token ids; words without tokens are left out."""
    kept = [[list(word) for word in words if len(word)] for words in rows]
    width = max((sum(map(len, words)) for words in kept), default=0)
    packed = np.zeros((len(kept), 2, width), np.int32)
    packed[:, 1, :] = -1
    for index, words in enumerate(kept):
        flat = [token for word in words for token in word]
        packed[index, 0, : len(flat)] = flat
        packed[index, 1, : len(words)] = np.cumsum([len(word) for word in words], dtype=np.int32)
    return packed


def unpack_words(packed: Any, name: str) -> tuple[tuple[int, ...], ...]:
    """The words of one prompt: packed is int32 [2, n]. Raises when the offsets make no sense."""
    ids, ends = packed[0].tolist(), packed[1].tolist()
    words, start = [], 0
    for end in ends:
        if end == -1:
            break
        if not start < end <= len(ids):
            raise ConfigError(
                f"{name}: row 1 has end offset {end} after {start}, expected a larger one up to {len(ids)}, or -1"
            )
        words.append(tuple(ids[start:end]))
        start = end
    return tuple(words)
