"""The PyTorch lowering of the PT decoder: every operation computes at once, for one rank, on packed tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass

import torch
from torch.nn import functional

from pt_trtllm.comm.base import Communicator
from pt_trtllm.network import native_norm
from pt_trtllm.network.graph import AttentionSpec, MoeSpec
from pt_trtllm.network.kv_cache import KvCache
from pt_trtllm.network.logits import pack
from pt_trtllm.network.rope import apply_rope
from pt_trtllm.network.step import StepBatch
from pt_trtllm.network.torch_linear import Linear


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """One rank's weights, ready to compute with. What differs between tracks has a leading axis of local tracks."""

    tensors: MappingABC[str, torch.Tensor]
    """Embedding, norms, biases, routers."""
    linears: MappingABC[str, Linear]
    experts: MappingABC[str, list[list[Linear]]]
    """name -> [track][expert]"""
    rope: tuple[torch.Tensor, torch.Tensor]
    """cos and sin, [positions, head_dim / 2]"""
    rope_style: str
    head: Linear
    """This rank's shard of the vocabulary; may be short of `head_rows` where the vocabulary is padded."""
    head_rows: int
    vocab_size: int


class TorchGraph:
    """Implements `Graph[torch.Tensor]` for one step."""

    def __init__(self, weights: RankWeights, cache: KvCache, comm: Communicator, batch: StepBatch, num_tracks: int):
        self.weights, self.cache, self.comm, self.batch = weights, cache, comm, batch
        self.num_tracks = num_tracks
        """Local tracks."""
        cache.begin_step(batch)

    @functools.cached_property
    def _angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the step's tokens"""
        positions, (cos, sin) = self.batch.positions, self.weights.rope
        return cos[positions], sin[positions]

    def embedding(self, weight: str) -> torch.Tensor:
        return functional.embedding(self.batch.token_ids, self.weights.tensors[weight])

    def dispatch(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.expand(self.num_tracks, *hidden.shape)

    def rms_norm(self, x: torch.Tensor, weight: str | None, *, eps: float, pre_scale: bool = False) -> torch.Tensor:
        scale = None if weight is None else self.weights.tensors[weight]
        rows = x[None] if x.dim() == 2 else x.reshape(x.shape[0], -1, x.shape[-1])
        return native_norm.rms_norm(rows, scale, eps=eps, pre_scale=pre_scale).view(x.shape)

    def linear(self, x: torch.Tensor, weight: str) -> torch.Tensor:
        return self.weights.linears[weight](x)

    def add_bias(self, x: torch.Tensor, bias: str) -> torch.Tensor:
        return x + self.weights.tensors[bias][:, None, :]

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def split_heads(self, qkv: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        query, key, value = qkv.unflatten(-1, (sum(heads), spec.head_dim)).split(heads, dim=2)
        return query, key, value

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        return apply_rope(x, *self._angles, self.weights.rope_style)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        return self.cache.attend(spec.layer_idx, query, key, value, spec.window)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate) * up

    def moe(self, x: torch.Tensor, spec: MoeSpec) -> torch.Tensor:
        router = self.weights.tensors[spec.router]
        logits = torch.bmm(x, router.transpose(1, 2)).float()
        if spec.logits_cap is not None:
            logits = spec.logits_cap * torch.tanh(logits / spec.logits_cap)
        scores, chosen = logits.softmax(dim=-1).topk(spec.experts_per_token, dim=-1)
        scores = scores / scores.sum(dim=-1, keepdim=True)
        return torch.stack(
            [self._track_experts(x[track], scores[track], chosen[track], spec, track) for track in range(x.shape[0])]
        )

    def _track_experts(
        self, x: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor, spec: MoeSpec, track: int
    ) -> torch.Tensor:
        """One track's experts, each over the tokens that chose it: [tokens, hidden]."""
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        up_gate, down = self.weights.experts[spec.up_gate][track], self.weights.experts[spec.down][track]
        for expert in chosen.unique().tolist():
            tokens, rank = (chosen == expert).nonzero(as_tuple=True)
            result = down[expert](native_norm.swiglu(up_gate[expert](x[tokens][None]), gate_first=False))[0]
            output.index_add_(0, tokens, result.float() * scores[tokens, rank, None])
        return output.to(x.dtype)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.comm.all_reduce(x)

    def track_fusion(self, x: torch.Tensor, base: torch.Tensor, op: str) -> torch.Tensor:
        if x.shape[0] == 1:
            hidden = x[0]
        else:  # local tracks first, in float32, so that one message per rank remains
            local = x.float().sum(dim=0)
            hidden = (local / x.shape[0] if op == "mean" else local).to(x.dtype)
        return self.comm.track_fusion(hidden, op, base)

    def logits(self, hidden: torch.Tensor, weight: str) -> torch.Tensor:
        """Rank 0 gets what all ranks packed (see `network/logits.py`); the others an empty tensor."""
        rows = hidden[self.batch.logit_rows]
        shard, head_rows = self.weights.head(rows[None])[0].float(), self.weights.head_rows
        packed = pack(shard, self.batch, first_token=self.comm.rank * head_rows, head_rows=head_rows)
        gathered = self.comm.gather_logits(packed)
        return shard.new_empty(0) if gathered is None else gathered
