"""Rotary positions: tables of cosines and sines, computed once, and the rotation itself.

Frequencies follow the float32 arithmetic of the implementation that a style comes from, step by step. At position
100000 the last bit of a frequency is a hundredth of a radian, so "mathematically equal" would not give equal logits.
"""

from __future__ import annotations

import math

import torch

from pt_trtllm.config import ModelConfig, RopeScaling


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the first positions: two float32 tensors [num_positions, head_dim / 2]."""
    frequencies, attention_factor = _scaled_frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """Rotates pairs of features of x [..., tokens, heads, head_dim] by angles [tokens, head_dim / 2].

    Pairs are neighbours ("interleaved") or the two halves of a head ("half"). Computed in float32, returned as x.dtype.
    """
    halves, y = style == "half", x.float()
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = y.chunk(2, dim=-1) if halves else (y[..., 0::2], y[..., 1::2])
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return (torch.cat(rotated, dim=-1) if halves else torch.stack(rotated, dim=-1).flatten(-2)).to(x.dtype)


def _scaled_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians per position [head_dim / 2] float32, and what cos and sin are multiplied by."""
    frequencies, scaling = _frequencies(config), config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(config, scaling)


def _frequencies(config: ModelConfig) -> torch.Tensor:
    """theta ** (-2i / head_dim)"""
    if config.rope_style == "interleaved":  # the reference: powers in float64, then rounded
        exponents = (-2 * i / config.head_dim for i in range(config.head_dim // 2))
        return torch.tensor([math.pow(config.rope_theta, exponent) for exponent in exponents], dtype=torch.float32)
    return 1.0 / _wavelengths(config)  # Hugging Face: float32 throughout


def _wavelengths(config: ModelConfig) -> torch.Tensor:
    """Positions per radian: theta ** (2i / head_dim)"""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    powers: torch.Tensor = config.rope_theta**exponents
    return powers


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > original / low, wavelengths < original / high
    kept = (original / wavelengths - low) / (high - low)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    slowed = torch.where(is_long, frequencies / scaling.factor, frequencies)
    return torch.where(is_long | is_short, slowed, blended)


def _yarn(config: ModelConfig, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """Features that turn often within the trained length are kept, rare ones slowed down, a ramp lies between."""
    half, last = config.head_dim // 2, config.head_dim - 1

    def feature_with(turns: float) -> float:
        """The (fractional) pair of features that makes so many turns within the trained length."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = feature_with(scaling.beta_fast), feature_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    kept = 1 - ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = _wavelengths(config)
    frequencies = 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    factor = scaling.attention_factor
    return frequencies, factor if factor is not None else 0.1 * math.log(scaling.factor) + 1.0
