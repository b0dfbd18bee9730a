"""A sparse feed-forward of one track in vLLM: its own router and experts. Imported for sparse models only, because
vLLM's side of it moves more than the rest."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ReplicatedLinear

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping


class SparseFeedForward(nn.Module):
    def __init__(self, config: ModelConfig, mapping: Mapping, quant_config: object, prefix: str, key: str) -> None:
        """`key` names the experts in vLLM's registry: unlike `prefix`, it has one number, the layer's."""
        super().__init__()
        self.cap = config.router_logits_cap
        self.router = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, quant_config=None, prefix=f"{prefix}.router"
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=(config.moe_intermediate_size or 0) // mapping.tp_size,
            renormalize=True,
            tp_size=1,  # tracks know their own ranks, and every engine of data parallelism has all experts
            dp_size=1,
            pcp_size=1,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{key}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.router(x)[0].float()
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        routed: torch.Tensor = self.experts(hidden_states=x, router_logits=logits)
        return routed
