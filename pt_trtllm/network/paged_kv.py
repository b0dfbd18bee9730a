"""A paged KV cache in the attention library: blocks that sequences share one pool of."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

from pt_trtllm.errors import EngineError
from pt_trtllm.network import attention_library as lib

_HUGE_PAGE_BYTES = 2 << 20


class RaggedBatch:
    """One step's sequences, packed: made once per step, used by every layer."""

    def __init__(self, sequences: Sequence[tuple[int, int]], block_tables: torch.Tensor) -> None:
        """`sequences`: (new tokens, past tokens) in the order of the packed tokens. `block_tables` int32 [sequences,
        columns]: position p of sequence s is in block `block_tables[s, p // block_tokens]`. Entries of blocks that no
        token of the step sees may be anything.
        """
        count = len(sequences)
        if (
            block_tables.dtype != torch.int32
            or block_tables.dim() != 2
            or block_tables.shape[0] != count
            or not block_tables.is_cpu
            or (block_tables.shape[1] > 1 and block_tables.stride(1) != 1)
        ):
            raise EngineError(f"block_tables is {lib.found(block_tables)}, expected int32 [{count}, columns] on cpu")
        numbers = (ctypes.c_int32 * (3 * count))()
        self.total_tokens = 0
        for s, (num_tokens, past) in enumerate(sequences):
            numbers[s], numbers[count + s], numbers[2 * count + s] = self.total_tokens, num_tokens, past
            self.total_tokens += num_tokens
        self._owned = (numbers, block_tables)  # the struct points into them
        start = ctypes.addressof(numbers)
        self._struct = lib.Batch(
            start, start + 4 * count, start + 8 * count, block_tables.data_ptr(), block_tables.stride(0), count,
            block_tables.shape[1], self.total_tokens,
        )  # fmt: skip
        self.reference = ctypes.byref(self._struct)
        self.address = ctypes.addressof(self._struct)


class PagedKvCache:
    """Keys and values of past tokens in blocks that sequences share one pool of: `write`, then `attend`, per layer.

    int8 keeps one float32 scale per head and token. Blocks that nobody wrote cost no memory. Which block belongs to
    whom is the caller's business. Results of a token do not depend on the rest of the batch, on how its prompt was
    chunked, or on `num_threads`, bit by bit.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_tracks: int,
        num_kv_heads: int,
        head_dim: int,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        num_threads: int = 1,
    ) -> None:
        if dtype not in lib.CACHE_DTYPES:
            raise EngineError(f"KV cache of {lib.name_of(dtype)}, expected bfloat16, float16, float32 or int8")
        if head_dim % 16 or not 16 <= head_dim <= 256 or block_tokens % 16 or block_tokens < 16:
            raise EngineError(
                f"head_dim is {head_dim} and block_tokens {block_tokens}, expected multiples of 16, head_dim up to 256"
            )
        if min(num_layers, num_blocks, num_tracks, num_kv_heads) < 1:
            raise EngineError(
                f"{num_layers} layers, {num_blocks} blocks, {num_tracks} tracks, {num_kv_heads} key heads:"
                " expected at least one of each"
            )
        self._library = lib.load_library()
        self.num_blocks, self.num_tracks, self.num_kv_heads = num_blocks, num_tracks, num_kv_heads
        self.head_dim, self.block_tokens, self.dtype, self.num_threads = head_dim, block_tokens, dtype, num_threads
        heads = (num_blocks, num_tracks, num_kv_heads)
        self.keys = [_pool((*heads, head_dim, block_tokens), dtype) for _ in range(num_layers)]
        """Per layer [blocks, tracks, kv_heads, head_dim, block_tokens]: transposed, see the library's README."""
        self.values = [_pool((*heads, block_tokens, head_dim), dtype) for _ in range(num_layers)]
        """Per layer [blocks, tracks, kv_heads, block_tokens, head_dim]"""
        scaled = num_layers if dtype == torch.int8 else 0
        self.key_scales = [_pool((*heads, block_tokens), torch.float32) for _ in range(scaled)]
        self.value_scales = [_pool((*heads, block_tokens), torch.float32) for _ in range(scaled)]
        self._structs = [
            lib.Cache(
                self.keys[i].data_ptr(), self.values[i].data_ptr(), self.key_scales[i].data_ptr() if scaled else None,
                self.value_scales[i].data_ptr() if scaled else None, num_blocks, num_tracks, num_kv_heads, head_dim,
                block_tokens, lib.CACHE_DTYPES[dtype],
            )
            for i in range(num_layers)
        ]  # fmt: skip
        self._references = [ctypes.byref(struct) for struct in self._structs]

    def layer_address(self, layer_idx: int) -> int:
        """Of the layer's `pt_paged_kv`, which lives as long as this object."""
        return ctypes.addressof(self._structs[layer_idx])

    def write(self, layer_idx: int, batch: RaggedBatch, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [tracks, tokens, kv_heads, head_dim], views of a fused projection included."""
        shape = (self.num_tracks, batch.total_tokens, self.num_kv_heads, self.head_dim)
        rows, more = lib.heads_of("write", "key", key, shape), lib.heads_of("write", "value", value, shape)
        lib.check(
            self._library,
            self._library.pt_attention_write(
                self._references[layer_idx], batch.reference, ctypes.byref(rows), ctypes.byref(more), self.num_threads
            ),
        )

    def attend(
        self,
        layer_idx: int,
        batch: RaggedBatch,
        query: torch.Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [tracks, tokens, heads, head_dim] to [tracks, tokens, heads * head_dim], causally; keys and values of
        the step have been written. `window`: tokens before the current one that are seen, None means all. `scale`
        defaults to 1 / sqrt(head_dim).
        """
        num_heads = query.shape[2] if query.dim() == 4 else 0
        shape = (self.num_tracks, batch.total_tokens, num_heads, self.head_dim)
        rows = lib.heads_of("attend", "query", query, shape)
        if out is None:
            out = query.new_empty((*shape[:2], num_heads * self.head_dim))
        elif tuple(out.shape) != (*shape[:2], num_heads * self.head_dim):
            raise EngineError(f"attend: out is {lib.found(out)}, expected {[*shape[:2], num_heads * self.head_dim]}")
        result = lib.rows_of("attend", "out", out)
        if window is not None and window < 0:
            raise EngineError(f"attend: window is {window}, expected None or 0 and more")
        status = self._library.pt_attention_attend(
            self._references[layer_idx],
            batch.reference,
            ctypes.byref(rows),
            num_heads,
            -1 if window is None else window,
            1 / math.sqrt(self.head_dim) if scale is None else scale,
            ctypes.byref(result),
            self.num_threads,
        )
        if status:
            lib.check(self._library, status)
        return out


def _pool(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros, in huge pages where the system gives them: a decode step then misses the TLB once per 2 MiB."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # A huge page starts at a multiple of its size; anonymous memory costs nothing until it is written.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).view(shape)
