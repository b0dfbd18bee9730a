"""A step of the runtime as executions of an engine: what needs no GPU of the executor."""

from __future__ import annotations

import pytest
import torch

from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.engine.tensorrt.bindings import CONTEXT, GENERATION, bindings, cache_capacity
from pt_trtllm.engine.tensorrt.passes import batch_buckets, plan_passes
from pt_trtllm.errors import EngineError
from pt_trtllm.mapping import Mapping
from pt_trtllm.network.step import SequenceSlice, StepBatch

pytestmark = pytest.mark.unit

CAPACITY = 128
MODEL = ModelConfig(
    vocab_size=97, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, num_tracks=4, sync_interval=1,
)  # fmt: skip


def step(*pieces: tuple[int, int, int], logit_rows: list[int]) -> StepBatch:
    """(slot, new tokens, past) each; tokens are numbered from 100."""
    total = sum(num_tokens for _, num_tokens, _ in pieces)
    sequences = tuple(SequenceSlice(slot=slot, num_tokens=n, past=past) for slot, n, past in pieces)
    return StepBatch.with_whole_rows(torch.arange(100, 100 + total), sequences, torch.tensor(logit_rows))


def test_prompts_and_single_tokens_become_passes_of_their_profiles() -> None:
    batch = step((2, 1, 7), (0, 3, 0), (1, 1, 20), (3, 2, 5), logit_rows=[0, 3, 4])
    generation, first, second = plan_passes(batch, 8, CAPACITY, context_logits=False)
    assert [p.profile for p in (generation, first, second)] == [GENERATION, CONTEXT, CONTEXT]
    assert generation.first_row == 0
    assert generation.input_ids.tolist() == [[0], [104], [100], [0]]
    assert generation.position_ids.tolist() == [[0], [20], [7], [0]]
    assert generation.cache_write_indices.tolist() == [CAPACITY - 1, 20, 7, CAPACITY - 1]
    assert generation.key_value_lengths.tolist() == [1, 21, 8, 1]
    assert generation.take == ((2, 0), (1, 2))
    assert first.first_row == 0
    assert first.input_ids.tolist() == [[101, 102, 103]]
    assert first.position_ids.tolist() == [[0, 1, 2]]
    assert first.cache_write_indices.tolist() == [0]
    assert first.key_value_lengths.tolist() == [3]
    assert first.logit_rows.tolist() == [2]
    assert first.take == ((0, 1),)
    assert second.first_row == 3
    assert second.position_ids.tolist() == [[5, 6]]
    assert second.logit_rows.tolist() == [1]
    assert second.take == ()  # its prompt goes on: nobody reads the row that the profile demands


def test_every_shape_of_a_pass_lies_within_its_profile() -> None:
    limits = BuildLimits(max_batch_size=6, max_seq_len=64, max_num_tokens=32).resolve(4096)
    table = bindings(MODEL, Mapping(world_size=2, num_tracks=4), limits, "float16", context_logits=True)
    batch = step((5, 1, 63), (0, 26, 0), (1, 1, 0), logit_rows=[0, *range(1, 27), 27])
    for planned in plan_passes(batch, 6, cache_capacity(limits), context_logits=True):
        inputs = planned.inputs()
        for binding in table:
            if binding.name in inputs:
                shape = tuple(inputs[binding.name].shape)
                low, _, high = binding.shapes(planned.profile)
                assert all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)), binding.name
        assert int(planned.key_value_lengths.max()) <= cache_capacity(limits)
        writes = planned.cache_write_indices + planned.input_ids.shape[1]
        assert int(writes.max()) <= cache_capacity(limits)


def test_idle_rows_never_touch_a_sequence() -> None:
    limits = BuildLimits(max_batch_size=8, max_seq_len=128, max_num_tokens=32).resolve(4096)
    capacity = cache_capacity(limits)
    [planned] = plan_passes(step((7, 1, 127), logit_rows=[0]), 8, capacity, context_logits=False)
    assert capacity > limits.max_seq_len
    assert planned.cache_write_indices.tolist() == [capacity - 1] * 7 + [127]


def test_the_logits_of_a_whole_chunk_need_an_engine_built_for_them() -> None:
    batch = step((0, 4, 0), logit_rows=[0, 1, 2, 3])
    with pytest.raises(EngineError, match=r"the logits of 4 tokens .* --gather-context-logits"):
        plan_passes(batch, 8, CAPACITY, context_logits=False)
    [planned] = plan_passes(batch, 8, CAPACITY, context_logits=True)
    assert planned.logit_rows.tolist() == [0, 1, 2, 3]
    assert planned.take == ((0, 0), (1, 1), (2, 2), (3, 3))


def test_cuda_graphs_are_shared_by_batches_of_one_bucket_and_never_by_prompts() -> None:
    def key(*pieces: tuple[int, int, int]) -> int | None:
        [planned] = plan_passes(step(*pieces, logit_rows=[0]), 100, CAPACITY, context_logits=False)
        return planned.graph_key

    assert key((0, 1, 3)) == 1
    assert key((2, 1, 3)) == key((3, 1, 9)) == 4
    assert key((40, 1, 3)) == 48
    assert key((64, 1, 3)) == 100
    assert key((0, 5, 0)) is None


@pytest.mark.parametrize("size", [1, 2, 3, 8, 63, 64, 65, 200, 256])
def test_buckets_grow_up_to_the_largest_batch(size: int) -> None:
    buckets = batch_buckets(size)
    assert buckets[-1] == size
    assert list(buckets) == sorted(set(buckets))
    assert len(buckets) <= 8 + size // 64 + 2


def test_the_table_names_caches_of_all_layers_in_place() -> None:
    limits = BuildLimits(max_batch_size=8, max_seq_len=64).resolve(4096)
    table = {b.name: b for b in bindings(MODEL, Mapping(world_size=2, num_tracks=4), limits, "float16",
                                         context_logits=False)}  # fmt: skip
    for layer_idx in range(2):
        for kind in ("key", "value"):
            present = table[f"present_{kind}_{layer_idx}"]
            assert present.aliases == f"past_{kind}_{layer_idx}"
            assert present.shape == table[f"past_{kind}_{layer_idx}"].shape == (-1, 4, 128, 16)
    assert table["logit_rows"].shapes(CONTEXT) == ((1,), (1,), (1,))
    assert table["logits"].shapes(GENERATION)[2] == (8, 97)
