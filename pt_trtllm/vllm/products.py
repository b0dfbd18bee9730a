"""The same projection of all local tracks: a loop over vLLM's linears, or one batched product of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class TrackProducts(nn.Module):
    """Calls the tracks' own linears, so that quantisation and adapters apply to each."""

    def __init__(self, owners: Sequence[nn.Module], name: str) -> None:
        super().__init__()
        self.owners, self.name = tuple(owners), name  # a tuple: the modules belong to their tracks

    @property
    def linears(self) -> list[Any]:
        """Looked up at each use: vLLM puts adapters in a linear's place."""
        return [getattr(owner, self.name) for owner in self.owners]

    def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[tokens, in] of every track to its [tokens, out]."""
        return [linear(x)[0] for linear, x in zip(self.linears, inputs, strict=True)]


class BatchedProducts(TrackProducts):
    """One product for all tracks: their weights become views of one tensor [tracks, out, in]."""

    def __init__(self, owners: Sequence[nn.Module], name: str) -> None:
        super().__init__(owners, name)
        self.quant_method = _StackAfterLoading()
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def stack(self) -> None:
        self.weight = _together([linear.weight for linear in self.linears])
        if self.linears[0].bias is not None:
            self.bias = _together([linear.bias for linear in self.linears])[:, None]
        for linear in self.linears:
            linear.quant_method = None  # nothing is left for vLLM to repack: the linears are not called

    def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert self.weight is not None
        x, weight = torch.stack(list(inputs)), self.weight.transpose(1, 2)
        y = torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias, x, weight)
        return list(y.unbind(0))


class _StackAfterLoading(QuantizeMethodBase):  # type: ignore[misc]
    """vLLM calls it for every module that has one, parents first, whatever filled the weights."""

    supports_pre_processed_weights = True

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the tracks' linears make the weights")

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("BatchedProducts computes by itself")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, BatchedProducts)
        layer.stack()


def _together(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    whole = torch.stack([part.data for part in parts])
    for part, own in zip(parts, whole, strict=True):
        part.data = own  # one memory for both; loading new weights goes on working
    return whole
