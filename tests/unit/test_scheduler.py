"""Steps: every token is computed exactly once, in order, within the limits; messages carry them unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig
from pt_trtllm.network.torch_ops import SequenceSlice, StepBatch
from pt_trtllm.runtime.messages import STOP, decode, encode
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.scheduler import Scheduler

pytestmark = pytest.mark.unit

MODEL = ModelConfig(
    vocab_size=50, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, head_dim=4, intermediate_size=8,
    eos_token_id=(7,),
)  # fmt: skip


def engine_config(limits: BuildLimits) -> EngineConfig:
    checkpoint = CheckpointConfig(model=MODEL, world_size=1, dtype="float32")
    return EngineConfig(backend="cpu", checkpoint=checkpoint, limits=limits.resolve(64))


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.booleans()), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    extra=st.integers(0, 20),
)
def test_every_token_is_computed_once_in_order(lengths: list[tuple[int, int, bool]], slots: int, extra: int) -> None:
    limits = BuildLimits(max_batch_size=slots, max_seq_len=64, max_num_tokens=slots + extra)
    config = engine_config(limits)
    scheduler = Scheduler(config.limits)
    sequences = []
    for index, (prompt, answer, context) in enumerate(lengths):
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        request = Request(prompt_ids=tuple(range(prompt)), params=params, context_logits=context)
        sequences.append(Sequence.start(index, request, config))
        scheduler.add(sequences[-1])
    computed: dict[int, list[int]] = {index: [] for index in range(len(sequences))}
    prompt_rows = dict.fromkeys(computed, 0)
    for _ in range(2000):
        if not scheduler.has_work():
            break
        step = scheduler.next_step()
        tokens = step.batch.token_ids.tolist()
        assert 0 < len(tokens) <= limits.max_num_tokens
        assert len({s.slot for s in step.batch.sequences}) == len(step.batch.sequences) <= slots
        by_slot = {
            sequence.slot: sequence for sequence in sequences if sequence.slot >= 0 and not sequence.finish_reason
        }
        for piece in step.batch.sequences:
            mine = computed[by_slot[piece.slot].index]
            assert len(mine) == piece.past
            mine += tokens[: piece.num_tokens]
            tokens = tokens[piece.num_tokens :]
        assert len(step.rows) == len(step.batch.logit_rows)
        for sequence, decides in step.rows:
            prompt_rows[sequence.index] += sequence.request.context_logits and not sequence.output_ids
            if decides:
                sequence.accept(40)
        scheduler.finish_step()
    assert not scheduler.has_work()
    for sequence, (prompt, answer, context) in zip(sequences, lengths, strict=True):
        assert sequence.output_ids == [40] * answer
        assert sequence.finish_reason == "length"
        assert computed[sequence.index] == [*range(prompt), *[40] * (answer - 1)]
        assert prompt_rows[sequence.index] == (prompt if context else 0)


def test_a_sequence_ends_at_its_end_token_and_keeps_it() -> None:
    config = engine_config(BuildLimits(max_seq_len=64))
    sequence = Sequence.start(0, Request(prompt_ids=(1,), params=SamplingParams(stop_token_ids=(9,))), config)
    sequence.accept(3)
    assert sequence.finish_reason is None
    sequence.accept(7)
    assert (sequence.finish_reason, sequence.output_ids) == ("stop", [3, 7])
    ignoring = Sequence.start(0, Request(prompt_ids=(1,), params=SamplingParams(ignore_eos=True, max_tokens=2)), config)
    ignoring.accept(7)
    ignoring.accept(7)
    assert ignoring.finish_reason == "length"


def test_an_answer_ends_where_the_room_does() -> None:
    config = engine_config(BuildLimits(max_seq_len=10))
    sequence = Sequence.start(0, Request(prompt_ids=(1,) * 8, params=SamplingParams(max_tokens=50)), config)
    assert sequence.max_new_tokens == 2


@given(
    pieces=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 1000)), min_size=1, max_size=6),
    rows=st.lists(st.integers(0, 4), max_size=5),
)
def test_messages_carry_steps_unchanged(pieces: list[tuple[int, int, int]], rows: list[int]) -> None:
    sequences = tuple(SequenceSlice(slot=slot, num_tokens=count, past=past) for slot, count, past in pieces)
    batch = StepBatch(
        token_ids=torch.arange(sum(piece[1] for piece in pieces)),
        sequences=sequences,
        logit_rows=torch.tensor(rows, dtype=torch.int64),
    )
    decoded = decode(encode(batch))
    assert decoded is not None
    assert decoded.sequences == sequences
    assert torch.equal(decoded.token_ids, batch.token_ids)
    assert torch.equal(decoded.logit_rows, batch.logit_rows)
    assert decode(STOP) is None
