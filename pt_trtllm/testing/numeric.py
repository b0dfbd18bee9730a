"""One way to compare numbers, with messages that show where they differ."""

from __future__ import annotations

import torch

FLOAT32_LOGITS = 1e-4
"""Largest difference to the reference, relative to the largest logit: other orders of summation, nothing more."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Raises with the shapes, the worst coordinate and both values."""
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    error = relative_error(found, expected)
    if not error <= tolerance:  # NaN fails too
        worst = int((found.double() - expected.double()).abs().nan_to_num(torch.inf).argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape)]
        raise AssertionError(
            f"{what}: relative error {error:.3g} exceeds {tolerance:g}; shape {list(found.shape)}, worst at {index}: "
            f"{found.flatten()[worst].item():.8g}, expected {expected.flatten()[worst].item():.8g}"
        )


def mean_kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over rows of KL(reference || logits) in nats."""
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
