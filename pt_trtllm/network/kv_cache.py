"""Keys and values of past tokens in blocks: the sequences' block tables, and the pools in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import EngineError
from pt_trtllm.mapping import Mapping
from pt_trtllm.network.kv_groups import KvGroup, kv_groups
from pt_trtllm.network.paged_kv import PagedKvCache, RaggedBatch
from pt_trtllm.network.step import StepBatch

BLOCK_TOKENS = 32
KV_CACHE_DTYPES = ("auto", "int8")
"""auto: the activations' type. int8: quantised per head and token, with a float32 scale each."""
NATIVE_HEAD_MULTIPLE, NATIVE_HEAD_MAX = 16, 256


class KvCache(Protocol):
    """One rank's cache, for all its tracks and layers. All tracks use the same blocks."""

    def begin_step(self, batch: StepBatch) -> None:
        """Takes in which blocks the step's sequences have got."""
        ...

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Stores the new keys and values [tracks, tokens, kv_heads, dim], attends: [tracks, tokens, heads * dim]."""
        ...


class BlockTables:
    """Which blocks every slot's sequence has per group, in order of positions; told in pieces as they are allocated."""

    def __init__(self, num_groups: int, num_slots: int, max_blocks: int) -> None:
        self._tables = torch.full((num_groups, num_slots, max_blocks), -1, dtype=torch.int32)
        self._slots: list[int] = []
        self._step_tables = self._tables[:, :0]

    def update(self, batch: StepBatch) -> torch.Tensor:
        """[groups, sequences of the step, max_blocks] int32, after the step's news."""
        slots = [piece.slot for piece in batch.sequences]
        changed = slots != self._slots
        for piece in batch.sequences:
            if piece.blocks:
                changed, first = True, piece.first_block
                news = torch.tensor(piece.blocks, dtype=torch.int32)
                self._tables[:, piece.slot, first : first + news.shape[1]] = news
        if changed:  # most decode steps need no new block
            self._slots, self._step_tables = slots, self._tables[:, slots]
        return self._step_tables


def cache_type(kv_cache_dtype: str, activations: torch.dtype) -> torch.dtype:
    """What one of `KV_CACHE_DTYPES` stands for."""
    return torch.int8 if kv_cache_dtype == "int8" else activations


def block_bytes(config: ModelConfig, mapping: Mapping, dtype: torch.dtype, group: KvGroup) -> int:
    """Keys and values of one block on one rank, over the group's layers and local tracks, scales included."""
    heads = len(group.layers) * mapping.tracks_per_rank * mapping.kv_heads_per_rank(config.num_kv_heads)
    scale_bytes = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * heads * BLOCK_TOKENS * (config.head_dim * dtype.itemsize + scale_bytes)


def make_cache(
    config: ModelConfig,
    mapping: Mapping,
    *,
    num_blocks: Sequence[int],
    num_slots: int,
    max_seq_len: int,
    dtype: torch.dtype,
) -> KvCache:
    """The native cache, or for head sizes its kernels do not take the one in PyTorch. `dtype`: see `cache_type`.

    `num_blocks`: of each of the model's `kv_groups`.
    """
    native = config.head_dim % NATIVE_HEAD_MULTIPLE == 0 and config.head_dim <= NATIVE_HEAD_MAX
    if dtype == torch.int8 and not native:
        raise EngineError(
            f"kv_cache_dtype is int8, which takes head sizes that are multiples of {NATIVE_HEAD_MULTIPLE} up to "
            f"{NATIVE_HEAD_MAX}; this model's is {config.head_dim}: use auto"
        )
    kind = NativeKvCache if native else TorchKvCache
    return kind(config, mapping, num_blocks=num_blocks, num_slots=num_slots, max_seq_len=max_seq_len, dtype=dtype)


class NativeKvCache:
    """The C++ kernels: they read the blocks in place."""

    def __init__(
        self,
        config: ModelConfig,
        mapping: Mapping,
        *,
        num_blocks: Sequence[int],
        num_slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> None:
        groups = kv_groups(config, max_seq_len)
        self.paged = [
            PagedKvCache(
                num_layers=len(group.layers),
                num_blocks=count,
                num_tracks=mapping.tracks_per_rank,
                num_kv_heads=mapping.kv_heads_per_rank(config.num_kv_heads),
                head_dim=config.head_dim,
                block_tokens=BLOCK_TOKENS,
                dtype=dtype,
                num_threads=torch.get_num_threads(),
            )
            for group, count in zip(groups, num_blocks, strict=True)
        ]
        """Per group."""
        self._places = _places(groups)
        self._tables = BlockTables(len(groups), num_slots, -(-max_seq_len // BLOCK_TOKENS))

    def begin_step(self, batch: StepBatch) -> None:
        pieces = [(s.num_tokens, s.past) for s in batch.sequences]
        self.ragged = [RaggedBatch(pieces, tables) for tables in self._tables.update(batch)]

    def group_of(self, layer_idx: int) -> int:
        """Which of `ragged` is a layer's."""
        return self._places[layer_idx][0]

    def layer_address(self, layer_idx: int) -> int:
        """Of the layer's `pt_paged_kv`, which lives as long as this object."""
        group, index = self._places[layer_idx]
        return self.paged[group].layer_address(index)

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        group, index = self._places[layer_idx]
        paged, ragged = self.paged[group], self.ragged[group]
        paged.write(index, ragged, key, value)
        return paged.attend(index, ragged, query, window=window)


class TorchKvCache:
    """Any head size, nothing to build; copies what it attends to. The native cache is held to its results."""

    def __init__(
        self,
        config: ModelConfig,
        mapping: Mapping,
        *,
        num_blocks: Sequence[int],
        num_slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> None:
        kv_heads = mapping.kv_heads_per_rank(config.num_kv_heads)
        groups = kv_groups(config, max_seq_len)
        self._places, shape = _places(groups), (mapping.tracks_per_rank, kv_heads, BLOCK_TOKENS, config.head_dim)
        counts = [num_blocks[self._places[layer_idx][0]] for layer_idx in range(config.num_hidden_layers)]
        self._keys = [torch.empty((count, *shape), dtype=dtype) for count in counts]
        self._values = [torch.empty((count, *shape), dtype=dtype) for count in counts]
        self._tables = BlockTables(len(groups), num_slots, -(-max_seq_len // BLOCK_TOKENS))

    def begin_step(self, batch: StepBatch) -> None:
        self._batch, self._step_tables = batch, self._tables.update(batch).long()

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        first = 0
        for piece, table in zip(self._batch.sequences, self._step_tables[self._places[layer_idx][0]], strict=True):
            rows, total = slice(first, first + piece.num_tokens), piece.past + piece.num_tokens
            at = torch.arange(piece.past, total)
            blocks, offsets = table[at // BLOCK_TOKENS], at % BLOCK_TOKENS
            for pool, new in ((self._keys[layer_idx], key), (self._values[layer_idx], value)):
                pool[blocks, :, :, offsets] = new[:, rows].transpose(0, 1)
            start = 0 if window is None else max(0, piece.past - window) // BLOCK_TOKENS
            mine = table[start : -(-total // BLOCK_TOKENS)]
            keys, values = (_contiguous(pool[layer_idx][mine]) for pool in (self._keys, self._values))
            first_key = start * BLOCK_TOKENS
            keys, values = keys[:, :, : total - first_key], values[:, :, : total - first_key]
            output[:, rows] = _attend(query[:, rows], keys, values, piece.past, first_key, window)
            first += piece.num_tokens
        return output.flatten(2)


def _places(groups: Sequence[KvGroup]) -> dict[int, tuple[int, int]]:
    """Per layer its group, and which of the group's layers it is."""
    return {
        layer_idx: (number, index)
        for number, group in enumerate(groups)
        for index, layer_idx in enumerate(group.layers)
    }


def _contiguous(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, tracks, kv_heads, block_tokens, dim] to [tracks, kv_heads, tokens, dim]."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, past: int, first_key: int, window: int | None
) -> torch.Tensor:
    """query [tracks, new, heads, dim] at positions past.., keys and values from position first_key on."""
    at = torch.arange(past, past + query.shape[1])[:, None]
    seen = torch.arange(first_key, first_key + keys.shape[2])[None, :]
    mask = seen <= at
    if window is not None:
        mask &= seen >= at - window
    output = functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=query.shape[2] != keys.shape[1]
    )
    return output.transpose(1, 2)
