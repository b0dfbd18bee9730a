"""Logits from shards of the vocabulary: whole rows come back whole, reduced ones with the tokens that matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_trtllm.network.logits import Candidates, Logits, pack, unpack
from pt_trtllm.network.step import StepBatch
from pt_trtllm.runtime.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.unit


def gather(logits: torch.Tensor, top_k: list[int], num_ranks: int) -> Logits:
    """What rank 0 gets when the rows' vocabulary lies on so many ranks."""
    vocab_size = logits.shape[1]
    head_rows = -(-vocab_size // num_ranks)
    batch = StepBatch(
        token_ids=torch.zeros(len(top_k), dtype=torch.int64),
        sequences=(),
        logit_rows=torch.arange(len(top_k)),
        row_top_k=tuple(top_k),
    )
    shards = [logits[:, rank * head_rows : (rank + 1) * head_rows] for rank in range(num_ranks)]
    packed = [
        pack(shard, batch, first_token=rank * head_rows, head_rows=head_rows) for rank, shard in enumerate(shards)
    ]
    assert len({part.shape for part in packed}) == 1
    return unpack(torch.cat(packed, dim=1), batch, head_rows=head_rows, vocab_size=vocab_size)


@settings(max_examples=200)
@given(
    vocab_size=st.integers(1, 40),
    num_ranks=st.integers(1, 5),
    top_k=st.lists(st.integers(0, 9), max_size=6),
    levels=st.integers(2, 1000),
    seed=st.integers(0, 99),
)
def test_rows_are_whole_or_have_their_most_likely_tokens(
    vocab_size: int, num_ranks: int, top_k: list[int], levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (len(top_k), vocab_size), generator=generator).float()
    result = gather(logits, top_k, num_ranks)
    assert result.finite
    assert len(result.rows) == len(top_k)
    for row, expected, count in zip(result.rows, logits, top_k, strict=True):
        if not count:
            assert torch.equal(torch.as_tensor(row), expected)
            continue
        likely = min(count, vocab_size)
        values, tokens = expected.sort(descending=True, stable=True)
        if isinstance(row, int):
            assert max(top_k) == 1
            assert row == tokens[0]
            continue
        assert isinstance(row, Candidates)
        assert torch.equal(row.values[:likely], values[:likely])
        assert torch.equal(row.tokens[:likely], tokens[:likely])
        assert row.first == tokens[0]


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "seed": 3}, {"top_k": 40, "top_p": 0.8, "seed": 9}])
@pytest.mark.parametrize("ranks", [1, 3])
def test_candidates_give_the_same_tokens_as_whole_rows(options: dict[str, float], ranks: int) -> None:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    from_whole, from_candidates = (Sampler(params, [], 1000, frozenset()) for _ in range(2))
    count = from_candidates.num_candidates(0)
    assert count == options.get("top_k", 1)
    for seed in range(50):
        logits = 4 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed))
        (row,) = gather(logits, [count], ranks).rows
        assert from_candidates.next_token(row, 0) == from_whole.next_token(logits[0], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"top_k": 1000},
        {"logit_bias": {1: 2.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"bad_words_ids": [[1]]},
        {"min_tokens": 4},
    ],
)
def test_whole_rows_are_asked_for_where_few_candidates_are_not_enough(options: dict[str, object]) -> None:
    sampler = Sampler(SamplingParams(**options), [], 2000, frozenset({7}))  # type: ignore[arg-type]
    assert sampler.num_candidates(0) == 0
    assert sampler.num_candidates(4) == (1 if "min_tokens" in options else 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_damage_is_noticed(value: float, top_k: int) -> None:
    logits = torch.zeros(2, 12)
    logits[1, 7] = value
    assert not gather(logits, [top_k, top_k], 2).finite
