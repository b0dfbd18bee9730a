"""Records the decoder as a program. Neighbouring operations that one kernel does become one operation here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pt_trtllm.network.graph import AttentionSpec, MoeSpec
from pt_trtllm.network.program.ops import Add, Attend, Call, Embed, Linear, Op, QkNormRope, RmsNorm, Value
from pt_trtllm.network.torch_ops import RankWeights


@dataclass(frozen=True, eq=False)
class Heads(Value):
    """Queries, keys or values inside a fused projection, with what is to be done to them before attention."""

    qkv: Value | None = None
    spec: AttentionSpec | None = None
    work: tuple[str, ...] = ()
    """"norm" and "rope", in order"""
    weight: str | None = None
    eps: float = 0.0


class ProgramGraph:
    """Implements `Graph[Value]`; what was recorded is in `ops`, the logits are the last of them."""

    def __init__(self, weights: RankWeights, num_tracks: int) -> None:
        self._weights, self._num_tracks = weights, num_tracks
        self.ops: list[Op] = []

    def embedding(self, weight: str) -> Value:
        out = Value(None, self._weights.tensors[weight].shape[1])
        self.ops.append(Embed((), out, weight))
        return out

    def dispatch(self, hidden: Value) -> Value:
        return Value(self._num_tracks, hidden.width, hidden)

    def rms_norm(self, x: Value, weight: str | None, *, eps: float, pre_scale: bool = False) -> Value:
        if isinstance(x, Heads):
            assert not pre_scale
            return replace(x, work=(*x.work, "norm"), weight=weight, eps=eps)
        out = Value(x.tracks, x.width)
        self.ops.append(RmsNorm((x,), out, weight, eps, pre_scale))
        return out

    def linear(self, x: Value, weight: str) -> Value:
        out = Value(x.tracks, self._weights.linears[weight].out_features)
        self.ops.append(Linear((x,), out, weight))
        return out

    def add_bias(self, x: Value, bias: str) -> Value:
        last = self.ops[-1]
        if isinstance(last, Linear) and last.out is x and last.bias is None and last.up is None:
            self.ops[-1] = replace(last, bias=bias)  # one rounding less than two operations
            return x
        return self._call("add_bias", (x,), Value(x.tracks, x.width), bias)

    def add(self, x: Value, y: Value) -> Value:
        out = Value(x.tracks, x.width)
        self.ops.append(Add((x, y), out))
        return out

    def split_heads(self, qkv: Value, spec: AttentionSpec) -> tuple[Value, Value, Value]:
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        query, key, value = (Heads(qkv.tracks, count * spec.head_dim, qkv=qkv, spec=spec) for count in heads)
        return query, key, value

    def rope(self, x: Value) -> Value:
        assert isinstance(x, Heads)
        return replace(x, work=(*x.work, "rope"))

    def attention(self, query: Value, key: Value, value: Value, spec: AttentionSpec) -> Value:
        assert isinstance(query, Heads)
        assert isinstance(key, Heads)
        assert isinstance(value, Heads)
        qkv = query.qkv
        assert qkv is not None
        assert qkv is key.qkv is value.qkv
        assert spec == query.spec
        assert query.work == key.work
        assert query.eps == key.eps
        assert not value.work
        if query.work:
            norm = None
            if "norm" in query.work:
                norm = "after_rope" if query.work[0] == "rope" else "before_rope"
            self.ops.append(
                QkNormRope((qkv,), None, spec, norm, (query.weight, key.weight), query.eps, "rope" in query.work)
            )
        out = Value(qkv.tracks, spec.num_heads * spec.head_dim)
        self.ops.append(Attend((qkv,), out, spec))
        return out

    def swiglu(self, gate: Value, up: Value) -> Value:
        out = Value(gate.tracks, gate.width)
        first, second = self.ops[-2:]
        if (
            isinstance(first, Linear)
            and isinstance(second, Linear)
            and (first.out, second.out) == (gate, up)
            and first.inputs == second.inputs
            and first.bias is None is second.bias
        ):
            self.ops[-2:] = [Linear(first.inputs, out, first.weight, up=second.weight)]
            return out
        return self._call("swiglu", (gate, up), out)

    def moe(self, x: Value, spec: MoeSpec) -> Value:
        return self._call("moe", (x,), Value(x.tracks, x.width), spec)

    def all_reduce(self, x: Value) -> Value:
        return self._call("all_reduce", (x,), Value(x.tracks, x.width))

    def track_fusion(self, x: Value, base: Value, op: str) -> Value:
        return self._call("track_fusion", (x, base), Value(None, x.width), op)

    def logits(self, hidden: Value, weight: str) -> Value:
        """Their memory is made by the call."""
        self.ops.append(Call((hidden,), None, "logits", (weight,)))
        return hidden

    def _call(self, name: str, inputs: tuple[Value, ...], out: Value, *arguments: object) -> Value:
        self.ops.append(Call(inputs, out, name, arguments))
        return out
