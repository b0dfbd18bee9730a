"""Recorded operations as the structs that the program library runs: pointers, strides and numbers, bound once."""

from __future__ import annotations

import math

import torch

from pt_trtllm.errors import EngineError
from pt_trtllm.network.attention_library import DTYPES, NORMS, ROPES, Prologue, Rows, rows_of, weight_of
from pt_trtllm.network.kv_cache import NativeKvCache
from pt_trtllm.network.native_linear import NativeLinear
from pt_trtllm.network.program.buffers import Buffers
from pt_trtllm.network.program.library import (
    AddWork,
    AttendWork,
    EmbedWork,
    LinearWork,
    QkNormRopeWork,
    RmsNormWork,
    Work,
)
from pt_trtllm.network.program.ops import Add, Attend, Embed, Linear, Op, QkNormRope, RmsNorm
from pt_trtllm.network.torch_linear import StreamedLinear
from pt_trtllm.network.torch_ops import RankWeights


class Lowering:
    """Pointers go into `weights`, `buffers` and `cache`: they must outlive what is made here."""

    def __init__(self, weights: RankWeights, buffers: Buffers, cache: NativeKvCache) -> None:
        self._weights, self._buffers, self._cache = weights, buffers, cache

    def lower(self, op: Op) -> list[Work]:
        match op:
            case Embed():
                return [self._embed(op)]
            case Linear():
                return list(self._linear(op))
            case RmsNorm():
                return [self._rms_norm(op)]
            case Add():
                return [self._add(op)]
            case QkNormRope():
                return [self._qk_norm_rope(op)]
            case Attend():
                return [self._attend(op)]
        raise AssertionError(f"no kernel for {op}")

    def _embed(self, op: Embed) -> EmbedWork:
        table, out = self._weights.tensors[op.weight], self._out(op)
        assert table.is_contiguous()
        assert table.dtype == out.dtype
        return EmbedWork(table.data_ptr(), out.data_ptr(), table.shape[0], table.stride(0) * table.itemsize)

    def _linear(self, op: Linear) -> list[LinearWork]:
        x, out = self._buffers.of(op.inputs[0]), self._out(op)
        weight, up = self._native(op.weight), None if op.up is None else self._native(op.up)
        bias = None if op.bias is None else self._weights.tensors[op.bias]
        if bias is not None and (tuple(bias.shape) != (out.shape[0], out.shape[2]) or bias.dtype != x.dtype):
            raise EngineError(f"{op.bias} is {bias.dtype} {list(bias.shape)}, expected {x.dtype} of {op.weight}")
        return [
            LinearWork(
                weight.pointers[track],
                None if up is None else up.pointers[track],
                x[track].data_ptr(),
                None if bias is None else bias[track].data_ptr(),
                out[track].data_ptr(),
                DTYPES[x.dtype],
            )
            for track in range(out.shape[0])
        ]

    def _rms_norm(self, op: RmsNorm) -> RmsNormWork:
        x, out = self._buffers.of(op.inputs[0]), self._out(op)
        tracks, _, width = out.shape
        weight = None if op.weight is None else self._weights.tensors[op.weight]
        pointer, dtype, stride = weight_of("rms_norm", weight, x.dtype, tracks, width)
        return RmsNormWork(_rows(x), _rows(out), pointer, stride, tracks, width, dtype, op.pre_scale, op.eps)

    def _add(self, op: Add) -> AddWork:
        out = self._out(op)
        x, y = (self._buffers.of(value) for value in op.inputs)
        return AddWork(_rows(x), _rows(y), _rows(out), out.shape[0], out.shape[2])

    def _qk_norm_rope(self, op: QkNormRope) -> QkNormRopeWork:
        qkv, spec, (cos, sin) = self._buffers.of(op.inputs[0]), op.spec, self._weights.rope
        tensors = [None if name is None else self._weights.tensors[name] for name in op.weights]
        query, key = (weight_of("qk_norm_rope", part, qkv.dtype, qkv.shape[0], spec.head_dim) for part in tensors)
        assert query[1] == key[1]
        work = Prologue(
            query[0], key[0], cos.data_ptr(), sin.data_ptr(), None, query[2], key[2], cos.shape[0], spec.num_heads,
            spec.num_kv_heads, spec.head_dim, query[1], NORMS[op.norm],
            ROPES[self._weights.rope_style if op.rope else None], op.eps,
        )  # fmt: skip
        return QkNormRopeWork(_rows(qkv), work, qkv.shape[0])

    def _attend(self, op: Attend) -> AttendWork:
        qkv, out, spec = self._buffers.of(op.inputs[0]), self._out(op), op.spec
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        query, key, value = qkv.split([count * spec.head_dim for count in heads], dim=2)
        return AttendWork(
            self._cache.layer_address(spec.layer_idx), _rows(query), _rows(key), _rows(value), _rows(out),
            -1 if spec.window is None else spec.window, spec.num_heads, 1 / math.sqrt(spec.head_dim),
            self._cache.group_of(spec.layer_idx),
        )  # fmt: skip

    def _out(self, op: Op) -> torch.Tensor:
        assert op.out is not None
        return self._buffers.of(op.out)

    def _native(self, name: str) -> NativeLinear:
        linear = self._weights.linears[name]
        assert isinstance(linear, StreamedLinear)
        return linear.native


def _rows(x: torch.Tensor) -> Rows:
    return rows_of("program", "an activation", x)
