"""The attention library (``plugins/src/attention``), bound: a paged KV cache, and the small kernels around it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

from pt_trtllm import env, native
from pt_trtllm.errors import EngineError

LIBRARY_NAME = "libpt_attention.so"

_ABI_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CACHE_DTYPES = _DTYPES | {torch.int8: 3}
_NORMS = {None: 0, "before_rope": 1, "after_rope": 2}
_ROPES = {None: 0, "interleaved": 1, "half": 2}
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
            raise EngineError(f"block_tables is {_found(block_tables)}, expected int32 [{count}, columns] on cpu")
        numbers = (ctypes.c_int32 * (3 * count))()
        self.total_tokens = 0
        for s, (num_tokens, past) in enumerate(sequences):
            numbers[s], numbers[count + s], numbers[2 * count + s] = self.total_tokens, num_tokens, past
            self.total_tokens += num_tokens
        self._owned = (numbers, block_tables)  # the struct points into them
        start = ctypes.addressof(numbers)
        self._struct = _Batch(
            start, start + 4 * count, start + 8 * count, block_tables.data_ptr(), block_tables.stride(0), count,
            block_tables.shape[1], self.total_tokens,
        )  # fmt: skip
        self.reference = ctypes.byref(self._struct)


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
        if dtype not in _CACHE_DTYPES:
            raise EngineError(f"KV cache of {_name(dtype)}, expected bfloat16, float16, float32 or int8")
        if head_dim % 16 or not 16 <= head_dim <= 256 or block_tokens % 16 or block_tokens < 16:
            raise EngineError(
                f"head_dim is {head_dim} and block_tokens {block_tokens}, expected multiples of 16, head_dim up to 256"
            )
        if min(num_layers, num_blocks, num_tracks, num_kv_heads) < 1:
            raise EngineError(
                f"{num_layers} layers, {num_blocks} blocks, {num_tracks} tracks, {num_kv_heads} key heads:"
                " expected at least one of each"
            )
        self._library = _load_library()
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
            _Cache(
                self.keys[i].data_ptr(), self.values[i].data_ptr(), self.key_scales[i].data_ptr() if scaled else None,
                self.value_scales[i].data_ptr() if scaled else None, num_blocks, num_tracks, num_kv_heads, head_dim,
                block_tokens, _CACHE_DTYPES[dtype],
            )
            for i in range(num_layers)
        ]  # fmt: skip
        self._references = [ctypes.byref(struct) for struct in self._structs]

    @property
    def block_bytes(self) -> int:
        """Memory of one block over all layers: what to divide a budget by."""
        pools = self.keys + self.values + self.key_scales + self.value_scales
        return sum(pool.nbytes for pool in pools) // self.num_blocks

    def write(self, layer_idx: int, batch: RaggedBatch, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [tracks, tokens, kv_heads, head_dim], views of a fused projection included."""
        shape = (self.num_tracks, batch.total_tokens, self.num_kv_heads, self.head_dim)
        rows, more = _heads("write", "key", key, shape), _heads("write", "value", value, shape)
        _check(
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
        rows = _heads("attend", "query", query, shape)
        if out is None:
            out = query.new_empty((*shape[:2], num_heads * self.head_dim))
        elif tuple(out.shape) != (*shape[:2], num_heads * self.head_dim):
            raise EngineError(f"attend: out is {_found(out)}, expected {[*shape[:2], num_heads * self.head_dim]}")
        result = _rows("attend", "out", out)
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
            _check(self._library, status)
        return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    pre_scale: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the last axis of x [tracks, tokens, width] with weight [tracks, width] or [width], in float32.

    x may be a view that repeats one track. `pre_scale` multiplies by the weight before, not after. `out` may be x.
    """
    rows = _rows("rms_norm", "x", x)
    tracks, tokens, width = x.shape
    if out is None:
        out = x.new_empty(x.shape)
    elif out.shape != x.shape or out.dtype != x.dtype:
        raise EngineError(f"rms_norm: out is {_found(out)}, expected {_name(x.dtype)} {list(x.shape)}")
    target = _rows("rms_norm", "out", out)
    pointer, dtype, stride = _weight("rms_norm", weight, x.dtype, tracks, width)
    library = _load_library()
    status = library.pt_rms_norm(
        ctypes.byref(rows), ctypes.byref(target), tracks, tokens, width, pointer, dtype, stride, eps, pre_scale
    )
    if status:
        _check(library, status)
    return out


def qk_norm_rope_(
    qkv: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: str | None = None,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    rope: str | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises and rotates queries and keys in place on qkv [tracks, tokens, (heads + 2 * kv_heads) * head_dim].

    `norm`: None, "before_rope" or "after_rope", with weights None, [head_dim] or [tracks, head_dim]. `rope`: None,
    "interleaved" or "half", with cos and sin float32 [rows, head_dim / 2]: row `positions[i]` for token i, or row i.
    """
    rows = _rows("qk_norm_rope", "qkv", qkv)
    tracks, tokens, width = qkv.shape
    if width != (num_heads + 2 * num_kv_heads) * head_dim:
        raise EngineError(
            f"qk_norm_rope: qkv is {_found(qkv)}, expected {num_heads} + 2 * {num_kv_heads} heads of {head_dim}"
        )
    if norm not in _NORMS or rope not in _ROPES:
        raise EngineError(f"qk_norm_rope: norm is {norm!r} and rope {rope!r}, expected {[*_NORMS]} and {[*_ROPES]}")
    query = _weight("qk_norm_rope", query_weight, qkv.dtype, tracks, head_dim)
    key = _weight("qk_norm_rope", key_weight, qkv.dtype, tracks, head_dim)
    if query_weight is not None and key_weight is not None and query[1] != key[1]:
        raise EngineError("qk_norm_rope: the weights of query and key have two types, expected one")
    num_rows = 0
    if rope is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            if table is None or table.dtype != torch.float32 or not table.is_contiguous() or not table.is_cpu:
                raise EngineError(f"qk_norm_rope: {name} is {_found(table)}, expected float32, contiguous on cpu")
            if table.dim() != 2 or table.shape[1] != head_dim // 2 or (cos is not None and table.shape != cos.shape):
                raise EngineError(f"qk_norm_rope: {name} is {_found(table)}, expected [rows, {head_dim // 2}]")
            num_rows = table.shape[0]
        if positions is not None and (
            positions.dtype != torch.int64 or tuple(positions.shape) != (tokens,) or not positions.is_contiguous()
        ):
            raise EngineError(f"qk_norm_rope: positions is {_found(positions)}, expected int64 [{tokens}]")
    work = _Prologue(
        query[0], key[0], *(None if table is None else table.data_ptr() for table in (cos, sin, positions)), query[2],
        key[2], num_rows, num_heads, num_kv_heads, head_dim, key[1] if query_weight is None else query[1],
        _NORMS[norm], _ROPES[rope], eps,
    )  # fmt: skip
    library = _load_library()
    _check(library, library.pt_qk_norm_rope(ctypes.byref(rows), tracks, tokens, ctypes.byref(work)))
    return qkv


def swiglu(x: torch.Tensor, *, gate_first: bool) -> torch.Tensor:
    """silu(gate) * up of x [tracks, tokens, 2 * width] whose halves are gate and up, or up and gate."""
    rows = _rows("swiglu", "x", x)
    tracks, tokens, width = x.shape
    if width % 2:
        raise EngineError(f"swiglu: x is {_found(x)}, expected an even number of features")
    out = x.new_empty((tracks, tokens, width // 2))
    target = _rows("swiglu", "out", out)
    library = _load_library()
    status = library.pt_swiglu(ctypes.byref(rows), ctypes.byref(target), tracks, tokens, width // 2, gate_first)
    if status:
        _check(library, status)
    return out


def isa() -> str:
    """Instruction set of the kernels: baseline, avx2 or avx512 (`PT_KERNELS_ISA` overrides the choice)."""
    library = _load_library()
    name: bytes | None = library.pt_attention_isa()
    if name is None:
        raise EngineError(library.pt_attention_last_error().decode(errors="replace"))
    return name.decode()


def library_path() -> Path:
    """Where this library is. Raises with how to build it."""
    return native.library_path(LIBRARY_NAME, env.ATTENTION_LIBRARY, EngineError)


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "num_tracks", "num_kv_heads", "head_dim", "block_tokens")),
        ("dtype", ctypes.c_int32),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("first_token", "num_tokens", "past", "block_table")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_sequences", "max_blocks", "total_tokens")),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("track_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class _Prologue(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query_weight", "key_weight", "cos", "sin", "positions")),
        *((name, ctypes.c_int64) for name in ("query_weight_track_stride", "key_weight_track_stride", "num_rows")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "weight_dtype", "norm", "rope")),
        ("eps", ctypes.c_float),
    ]


@functools.cache
def _load_library() -> ctypes.CDLL:
    pointer, text, number, long, real = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float,
    )  # fmt: skip
    signatures: native.Signatures = {
        "pt_attention_last_error": (text, []),
        "pt_attention_abi_version": (number, []),
        "pt_attention_isa": (text, []),
        "pt_attention_write": (number, [pointer] * 4 + [number]),
        "pt_attention_attend": (number, [pointer] * 3 + [number, long, real, pointer, number]),
        "pt_rms_norm": (number, [pointer] * 2 + [number] * 3 + [pointer, number, long, real, number]),
        "pt_qk_norm_rope": (number, [pointer, number, number, pointer]),
        "pt_swiglu": (number, [pointer] * 2 + [number] * 4),
    }
    return native.load_library(library_path(), signatures, ("pt_attention_abi_version", _ABI_VERSION), EngineError)


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise EngineError(library.pt_attention_last_error().decode(errors="replace"))


def _rows(operation: str, name: str, x: torch.Tensor) -> _Rows:
    """[tracks, tokens, features] whose features are contiguous."""
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or x.dim() != 3 or not x.is_cpu or (x.shape[2] > 1 and x.stride(2) != 1):
        raise EngineError(
            f"{operation}: {name} is {_found(x)}, expected float32, bfloat16 or float16 [tracks, tokens, features] on"
            " cpu, features contiguous"
        )
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1), dtype)


def _heads(operation: str, name: str, x: torch.Tensor, shape: tuple[int, ...]) -> _Rows:
    """[tracks, tokens, heads, head_dim] whose heads lie side by side."""
    dtype = _DTYPES.get(x.dtype)
    if (
        dtype is None
        or tuple(x.shape) != shape
        or not x.is_cpu
        or x.stride(3) != 1
        or (shape[2] > 1 and x.stride(2) != shape[3])
    ):
        raise EngineError(
            f"{operation}: {name} is {_found(x)}, expected float32, bfloat16 or float16 {list(shape)} on cpu, heads and"
            " features contiguous"
        )
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1), dtype)


def _weight(
    operation: str, weight: torch.Tensor | None, dtype: torch.dtype, tracks: int, width: int
) -> tuple[int | None, int, int]:
    """Pointer, type and stride between tracks of None, [width] or [tracks, width]."""
    if weight is None:
        return None, _DTYPES[dtype], 0
    shared = weight.dim() == 1
    if (
        weight.dtype not in (dtype, torch.float32)
        or tuple(weight.shape) not in ((width,), (tracks, width))
        or not weight.is_contiguous()
        or not weight.is_cpu
    ):
        raise EngineError(
            f"{operation}: weight is {_found(weight)}, expected {_name(dtype)} or float32 [{tracks}, {width}] or"
            f" [{width}], contiguous on cpu"
        )
    return weight.data_ptr(), _DTYPES[weight.dtype], 0 if shared else width


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _found(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{_name(tensor.dtype)} {list(tensor.shape)} strides {list(tensor.stride())} on {tensor.device}"
