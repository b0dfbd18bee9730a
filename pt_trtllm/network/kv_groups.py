"""Layers that see equally far back share their block tables, and their blocks are freed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pt_trtllm.config import ModelConfig


@dataclass(frozen=True)
class KvGroup:
    window: int | None
    """Tokens before the current one that these layers see; None means all of them."""
    layers: tuple[int, ...]

    def first_seen(self, num_computed: int, block_tokens: int) -> int:
        """The first column of the block table that the token after `num_computed` others still sees."""
        return 0 if self.window is None else max(0, num_computed - self.window) // block_tokens

    def most_blocks(self, columns: Sequence[int], block_tokens: int, step_tokens: int, lead: int = 0) -> int:
        """What sequences that grow to so many columns can hold at once, with steps of up to `step_tokens`.

        `lead`: tokens that a sequence's cache may be ahead of those that are certain. What these see stays.
        """
        if self.window is None:
            return sum(columns)
        # Between steps: so many tokens, wherever they begin in a block. A step's first new token may open one more.
        resting = -(-(self.window + lead - 1) // block_tokens) + 2
        held = sum(min(count, resting) for count in columns)
        return held + min(step_tokens // block_tokens, sum(columns) - held)


def kv_groups(config: ModelConfig, max_seq_len: int) -> tuple[KvGroup, ...]:
    """One per distinct window, the layers that see everything first. A window that no sequence outgrows is none."""
    layers: dict[int | None, list[int]] = {}
    for layer_idx in range(config.num_hidden_layers):
        window = config.window(layer_idx)
        layers.setdefault(None if window is None or window >= max_seq_len - 1 else window, []).append(layer_idx)
    ordered = sorted(layers.items(), key=lambda item: (item[0] is not None, item[0] or 0))
    return tuple(KvGroup(window, tuple(members)) for window, members in ordered)
