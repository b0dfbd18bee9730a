"""The sparse feed-forward composed of primitives: TensorRT's own MoE layer has no kernels for these GPUs.

Only experts that some token chose are read: of E experts and T tokens with k each, the A = min(T * k, E) most wanted
are gathered and computed for all tokens, and each token adds up its own with their scores (zero for the rest). Exact,
no token is dropped; a decode step reads the k experts of its tokens, a long prompt all of them.
"""

from __future__ import annotations

import torch

from pt_trtllm.engine.tensorrt.layers import Layers, Tensor
from pt_trtllm.engine.tensorrt.quantized import chosen_experts
from pt_trtllm.engine.tensorrt.weights import MappedWeights
from pt_trtllm.network.graph import MoeSpec


def moe(layers: Layers, x: Tensor, weights: MappedWeights, spec: MoeSpec, dtype: torch.dtype) -> Tensor:
    """[tracks, tokens, hidden] to the same; every track has its own router and experts."""
    scores = _scores(layers, x, weights[spec.router], spec)
    experts, scores = _most_wanted(layers, scores, spec.experts_per_token)
    tracks, _, hidden, _ = weights.parts(spec.down)["weight"].shape
    up_gate = chosen_experts(layers, experts, spec.up_gate, weights.parts(spec.up_gate), dtype)
    down = chosen_experts(layers, experts, spec.down, weights.parts(spec.down), dtype)
    width = weights.parts(spec.up_gate)["weight"].shape[2] // 2
    rows = layers.reshape(x, (tracks, 1, -1, hidden))
    up, gate = layers.split(layers.matmul(rows, up_gate, transposed=True), (width, width), axis=3)
    y = layers.matmul(layers.mul(layers.silu(gate), up), down, transposed=True)  # [tracks, A, tokens, hidden]
    each = layers.reshape(layers.transpose(scores, (0, 2, 1)), (0, 0, -1, 1))
    weighted = layers.mul(layers.cast(y, torch.float32), each)
    return layers.cast(layers.reduce("SUM", weighted, 1, keep=False), dtype)


def _scores(layers: Layers, x: Tensor, router: torch.Tensor, spec: MoeSpec) -> Tensor:
    """float32 [tracks, tokens, experts]: what each token's chosen experts count, zero for the others."""
    num_experts = router.shape[1]
    logits = layers.matmul(x, layers.constant(spec.router, router), transposed=True)
    logits = layers.cast(logits, torch.float32)
    if spec.logits_cap is not None:
        capped = layers.activation("TANH", layers.scaled(logits, 1 / spec.logits_cap))
        logits = layers.scaled(capped, spec.logits_cap)
    softmax = layers.network.add_softmax(logits)
    softmax.axes = 1 << 2
    top = layers.network.add_topk(layers.output(softmax), layers.trt.TopKOperation.MAX, spec.experts_per_token, 1 << 2)
    values, chosen = layers.output(top), top.get_output(1)
    values = layers.elementwise("DIV", values, layers.reduce("SUM", values, 2, keep=True))
    numbers = layers.constant(
        f"expert numbers {num_experts}", torch.arange(num_experts, dtype=torch.int32), (1, 1, 1, num_experts)
    )
    is_chosen = layers.elementwise("EQUAL", layers.reshape(chosen, (0, 0, spec.experts_per_token, 1)), numbers)
    counts = layers.mul(
        layers.cast(is_chosen, torch.float32), layers.reshape(values, (0, 0, spec.experts_per_token, 1))
    )
    return layers.reduce("SUM", counts, 2, keep=False)


def _most_wanted(layers: Layers, scores: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """The A experts to compute, int32 [tracks, A], and their scores [tracks, tokens, A]."""
    num_experts = scores.shape[2]
    num_tokens = layers.gather(layers.shape(scores), layers.int64(1))
    wanted = layers.elementwise("PROD", num_tokens, layers.int64(experts_per_token))
    count = layers.cast(layers.elementwise("MIN", wanted, layers.int64(num_experts)), torch.int32)
    scalar = layers.network.add_shuffle(count)
    scalar.reshape_dims = layers.trt.Dims([])
    top = layers.network.add_topk(
        layers.reduce("MAX", scores, 1, keep=False), layers.trt.TopKOperation.MAX, num_experts, 1 << 1
    )
    top.set_input(1, layers.output(scalar))
    experts = top.get_output(1)
    by_expert = layers.transpose(scores, (0, 2, 1))
    picked = layers.network.add_gather(by_expert, experts, 1)
    picked.num_elementwise_dims = 1
    return experts, layers.transpose(layers.output(picked), (0, 2, 1))
