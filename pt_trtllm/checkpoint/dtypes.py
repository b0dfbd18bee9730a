"""The type that weights are written in."""

from __future__ import annotations

import torch

from pt_trtllm.config import DTYPES
from pt_trtllm.errors import CheckpointError, ConfigError


def target_dtype(name: str, found: torch.dtype) -> str:
    """The type that is asked for; `auto` keeps that of the source's weights, where it is one that we write."""
    if name == "auto":
        name = str(found).removeprefix("torch.")
        return name if name in DTYPES else "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, expected auto or one of {list(DTYPES)}")
    return name


def cast(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A block of weights of the tensor `name` in another type; raises when float16 cannot hold them."""
    if dtype == torch.float16 and block.dtype != dtype and block.abs().max() > torch.finfo(dtype).max:
        raise CheckpointError(
            f"{name} holds {block.abs().max().item():.4g}, beyond float16's 65504; choose --dtype bfloat16"
        )
    return block.to(dtype)
