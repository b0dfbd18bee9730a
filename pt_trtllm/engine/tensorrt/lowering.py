"""The PT decoder's operations as layers of an `INetworkDefinition`, for one rank.

Between blocks a value is [tokens, hidden] or [tracks, tokens, hidden] with tokens = batch * tokens of a row; inside
attention it is [batch, tracks, heads, tokens, head_dim]. Norms, rotations and sums of tracks are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.tensorrt.attention import CachedAttention
from pt_trtllm.engine.tensorrt.layers import Layers, Tensor
from pt_trtllm.engine.tensorrt.moe import moe
from pt_trtllm.engine.tensorrt.quantized import linear
from pt_trtllm.engine.tensorrt.weights import MappedWeights
from pt_trtllm.mapping import Mapping
from pt_trtllm.network.graph import AttentionSpec, MoeSpec


class TensorrtGraph:
    """Implements `Graph[ITensor]`: every call adds layers."""

    def __init__(
        self,
        layers: Layers,
        inputs: dict[str, Tensor],
        weights: MappedWeights,
        model: ModelConfig,
        mapping: Mapping,
        dtype: torch.dtype,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """`rope`: cosines and sines, float32 [positions, head_dim / 2]."""
        self._layers, self._inputs, self._weights, self._dtype = layers, inputs, weights, dtype
        self._model, self._mapping, self._rope = model, mapping, rope
        self.attention = CachedAttention(layers, inputs, mapping.tracks_per_rank)
        self._batch_shape: Tensor | None = None
        self._num_collectives = 0

    def embedding(self, weight: str) -> Tensor:
        layers = self._layers
        table = layers.constant(weight, self._weights[weight])
        tokens = layers.reshape(self._inputs["input_ids"], (-1,))
        return layers.gather(table, tokens)

    def dispatch(self, hidden: Tensor) -> Tensor:
        """Tracks start as one; the first product or sum with a track's own values makes them many."""
        return self._layers.reshape(hidden, (1, -1, self._model.hidden_size))

    def rms_norm(self, x: Tensor, weight: str | None, *, eps: float, pre_scale: bool = False) -> Tensor:
        layers = self._layers
        scale = None if weight is None else self._scale(weight, x)
        y = layers.cast(x, torch.float32)
        if scale is not None and pre_scale:
            y = layers.mul(y, scale)
        mean = layers.reduce("AVG", layers.mul(y, y), -1, keep=True)
        y = layers.elementwise("DIV", y, layers.unary("SQRT", layers.add(mean, layers.scalar(eps, mean))))
        if scale is not None and not pre_scale:
            y = layers.mul(y, scale)
        return layers.cast(y, self._dtype)

    def linear(self, x: Tensor, weight: str) -> Tensor:
        return linear(
            self._layers,
            self._of_every_track(x),
            weight,
            self._weights.parts(weight),
            quantizes_inputs=self._weights.quantization.quantizes_inputs,
        )

    def add_bias(self, x: Tensor, bias: str) -> Tensor:
        values = self._weights[bias]
        return self._layers.add(x, self._layers.constant(bias, values, (values.shape[0], 1, values.shape[1])))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._layers.add(x, y)

    def split_heads(self, qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
        layers, tracks = self._layers, self._mapping.tracks_per_rank
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        if self._batch_shape is None:
            self._batch_shape = layers.shape(self._inputs["input_ids"])
        shape = layers.concat([layers.int64(tracks), self._batch_shape, layers.int64(sum(heads), spec.head_dim)])
        every = layers.transpose(layers.reshape_to(qkv, shape), (1, 0, 3, 2, 4))
        query, key, value = layers.split(every, heads, axis=2)
        return query, key, value

    def rope(self, x: Tensor) -> Tensor:
        layers, (cos, sin) = self._layers, self._rope
        _, tracks, heads, _, head_dim = x.shape
        flat = layers.reshape(layers.cast(x, torch.float32), (0, tracks * heads, -1, head_dim))
        rotary = layers.network.add_rotary_embedding(
            flat,
            layers.constant("rope cosines", cos),
            layers.constant("rope sines", sin),
            self._model.rope_style == "interleaved",
            0,  # all features take part
        )
        rotary.set_input(3, self._inputs["position_ids"])
        rotated = layers.reshape(layers.output(rotary), (0, tracks, heads, -1, head_dim))
        return layers.cast(rotated, self._dtype)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._layers.mul(self._layers.silu(gate), up)

    def moe(self, x: Tensor, spec: MoeSpec) -> Tensor:
        return moe(self._layers, self._of_every_track(x), self._weights, spec, self._dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._collective("tensor_parallel", x, "ALL_REDUCE", "SUM", self._mapping.tp_group)

    def track_fusion(self, x: Tensor, base: Tensor, op: str) -> Tensor:
        layers, hidden = self._layers, self._model.hidden_size
        if self._mapping.tracks_per_rank > 1:  # local tracks first, in float32, so that one message per rank remains
            x = self._of_every_track(x)
            local = layers.reduce("AVG" if op == "mean" else "SUM", layers.cast(x, torch.float32), 0, keep=False)
            x = layers.cast(local, self._dtype)
        else:
            x = layers.reshape(x, (-1, hidden))
        group = self._mapping.fusion_group
        return self._collective("track_fusion", x, "ALL_REDUCE", "AVG" if op == "mean" else "SUM", group)

    def logits(self, hidden: Tensor, weight: str) -> Tensor:
        """float32 [rows, vocabulary] on every rank: each computes its shard, then all gather them."""
        layers, world_size = self._layers, self._mapping.world_size
        rows = layers.gather(hidden, self._inputs["logit_rows"])
        head = self._weights[weight if world_size == 1 else "lm_head.weight"]
        shard = layers.matmul(
            rows, layers.constant(weight if world_size == 1 else "lm_head.weight", head), transposed=True
        )
        shard = layers.cast(shard, torch.float32)
        if world_size == 1:
            return shard
        width = head.shape[0]
        gathered = self._collective("logits", shard, "ALL_GATHER", "NONE", tuple(range(world_size)))
        by_rank = layers.reshape(gathered, (world_size, -1, width))
        whole = layers.reshape(layers.transpose(by_rank, (1, 0, 2)), (-1, world_size * width))
        padding = world_size * width - self._model.vocab_size
        return layers.split(whole, (self._model.vocab_size,), axis=1)[0] if padding else whole

    def _collective(self, kind: str, x: Tensor, op: str, reduce_op: str, group: Sequence[int]) -> Tensor:
        """One collective over `group`, which every rank of it executes at the same place; none for a lone rank."""
        if len(group) == 1:
            return x
        layers, trt = self._layers, self._layers.trt
        layer = layers.network.add_dist_collective(
            x, getattr(trt.CollectiveOperation, op), getattr(trt.ReduceOperation, reduce_op), -1, list(group)
        )
        output = layers.output(layer, f"collective_{self._num_collectives}_{kind}")
        layer.num_ranks = len(group)
        self._num_collectives += 1
        return output

    def _of_every_track(self, x: Tensor) -> Tensor:
        """[1, tokens, hidden], still common to all tracks, as [tracks, tokens, hidden]."""
        tracks = self._mapping.tracks_per_rank
        return x if x.shape[0] == tracks else self._layers.concat([x] * tracks)

    def _scale(self, name: str, x: Tensor) -> Tensor:
        """A norm's weight in float32, shaped to be multiplied with x."""
        values, rank = self._weights[name], len(x.shape)
        tracks = values.shape[0] if values.dim() == 2 else 1
        at = 1 if rank == 5 else 0  # the axis of tracks
        shape = [tracks if axis == at else 1 for axis in range(rank - 1)]
        return self._layers.cast(self._layers.constant(name, values, (*shape, values.shape[-1])), torch.float32)
