"""What the clients of a soak ask, drawn from a seed, and how each request may end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ENSEMBLE, CORE, BLS, OPENAI = "ensemble", "tensorrt_llm", "tensorrt_llm_bls", "openai"
PATHS = ((ENSEMBLE, 0.4), (CORE, 0.2), (BLS, 0.15), (OPENAI, 0.25))
"""Which door, and how often."""
TEXTS = ("It is a truth", "She had never been", "The evening was", "Mr. Darcy", "A letter came, and")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One request: who is asked, what, with which options, and when its client leaves."""

    number: int
    path: str
    prompt: str
    max_tokens: int
    options: dict[str, Any]
    """By the names of `SamplingParams`."""
    leaves_after: int | None
    """Tokens, where the client does not wait for the end."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one attempt at a plan ended, as its client saw it."""

    plan: Plan
    request_id: str
    how: str
    """answered, left, failed (an error after it was taken), refused (not taken), wrong (anything that may not be)"""
    began: float
    ended: float
    num_tokens: int = 0
    text: str = ""
    """Of the error."""


def draw_plans(cancelled: float, seed: int) -> Iterator[Plan]:
    """Without end: short and long, greedy and sampled, guided, with stop strings and log-probabilities."""
    rng = random.Random(seed)
    for number in itertools.count():
        max_tokens = rng.choice((1, 4, 12, 24, 48))
        yield Plan(
            number=number,
            path=rng.choices([path for path, _ in PATHS], [weight for _, weight in PATHS])[0],
            prompt=" ".join(rng.choices(TEXTS, k=rng.choice((1, 1, 2, 12)))) + f" {number}",
            max_tokens=max_tokens,
            options=_options(rng),
            leaves_after=rng.randrange(max_tokens) if rng.random() < cancelled else None,
        )


def _options(rng: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"temperature": 0.8, "top_k": 40, "seed": rng.randrange(1 << 32), "ignore_eos": True},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1},
        {"stop": ("the", "\n")},
        {"logprobs": 3, "ignore_eos": True},
    ]
    return rng.choices(kinds, (5, 3, 2, 1, 1))[0]
