"""Sampling against plain restatements of what each option means."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])


def draws(
    count: int = 3000, prompt: tuple[int, ...] = (), logits: torch.Tensor = LOGITS, **options: object
) -> Counter[int]:
    params = SamplingParams(max_tokens=10**6, seed=1, **options)  # type: ignore[arg-type]
    sampler = Sampler(params, list(prompt), len(logits), frozenset())
    return Counter(sampler.next_token(logits, 0) for _ in range(count))


def test_without_options_the_most_likely_token_is_taken() -> None:
    assert set(draws(3)) == {4}
    assert set(draws(3, temperature=0.0)) == {4}
    assert set(draws(3, top_k=1, temperature=2.0)) == {4}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature: float) -> None:
    counts = draws(20000, temperature=temperature)
    expected = (LOGITS / temperature).softmax(0)
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] / 20000 - probability) < 0.015


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(top_k=3)) == {4, 0, 1}
    assert set(draws(top_k=100, temperature=1.0)) == set(range(6))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = LOGITS.softmax(0).sort(descending=True)
    reached = probabilities.values.cumsum(0)
    limit = float(reached[1]) - 0.01  # the second token is needed to reach it
    assert set(draws(top_p=limit)) == set(probabilities.indices[:2].tolist())
    assert set(draws(top_p=1.0)) == set(range(6))
    assert set(draws(top_p=1e-6)) == {4}


def test_min_p_is_relative_to_the_most_likely() -> None:
    relative = (LOGITS - LOGITS.max()).exp()
    assert set(draws(min_p=0.2)) == set((relative >= 0.2).nonzero().flatten().tolist())


def test_the_same_seed_draws_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.0, seed=2**64 - 1)
    first, second = (Sampler(params, [], 6, frozenset()) for _ in range(2))
    assert [first.next_token(LOGITS, 0) for _ in range(50)] == [second.next_token(LOGITS, 0) for _ in range(50)]


def test_without_a_seed_draws_differ() -> None:
    params = SamplingParams(temperature=5.0)
    runs = {tuple(Sampler(params, [], 6, frozenset()).next_token(LOGITS, 0) for _ in range(20)) for _ in range(5)}
    assert len(runs) > 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    # Seen in the prompt: 4 (3.0 -> 1.5) falls behind 0 (2.0); a negative logit gets more so.
    assert set(draws(1, prompt=(4,), repetition_penalty=2.0)) == {0}
    logits = torch.tensor([-1.0, -1.5])
    assert set(draws(1, prompt=(0,), logits=logits, repetition_penalty=2.0)) == {1}


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.5), [4], 6, frozenset())
    assert [sampler.next_token(LOGITS, i) for i in range(3)] == [4, 0, 4]  # 3.0, then 2.0 beats 1.5, then 1.5 beats 0.5
    sampler = Sampler(SamplingParams(frequency_penalty=0.75), [4], 6, frozenset())
    assert [sampler.next_token(LOGITS, i) for i in range(4)] == [4, 4, 0, 4]


def test_the_end_is_not_drawn_before_min_tokens() -> None:
    sampler = Sampler(SamplingParams(min_tokens=2), [], 6, frozenset({4, 999}))
    assert [sampler.next_token(LOGITS, count) for count in range(3)] == [0, 0, 4]


def test_the_logits_are_left_alone() -> None:
    logits = LOGITS.clone()
    sampler = Sampler(
        SamplingParams(temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.3, min_tokens=1),
        [1],
        6,
        frozenset({2}),
    )
    sampler.next_token(logits, 0)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0"),
        ({"seed": -1}, "seed is -1"),
        ({"min_tokens": 100}, "min_tokens is 100, expected 0 to max_tokens 64"),
    ],
)
def test_absurd_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_the_last_possible_draw_is_still_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw next to 1 must not fall off the end onto a token that is ruled out."""
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor(1.0 - 2**-24))
    for _ in range(50):
        logits = torch.randn(500, generator=generator)
        sampler = Sampler(SamplingParams(temperature=1.0, seed=1, min_tokens=1), [], 500, frozenset({7, 8}))
        assert sampler.next_token(logits, 0) not in (7, 8)


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_limit_too_small_for_float32_leaves_the_most_likely_token(top_k: int | None) -> None:
    params = SamplingParams(top_p=1e-300, top_k=top_k, temperature=1.0, seed=1)
    sampler = Sampler(params, [], 4, frozenset())
    assert sampler.next_token(torch.tensor([0.0, 2.0, 1.0, -1.0]), 0) == 1
