"""Steps: every token is computed once and in order, within limits and memory; messages carry them unchanged."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.network.kv_groups import KvGroup
from pt_trtllm.network.step import SequenceSlice, StepBatch
from pt_trtllm.runtime.kv_space import KvSpace
from pt_trtllm.runtime.messages import STOP, decode, encode
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.scheduler import POLICIES, Scheduler, Step

pytestmark = pytest.mark.unit

BLOCK = 4
MODEL = ModelConfig(
    vocab_size=50, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, head_dim=4, intermediate_size=8,
    eos_token_id=(7,),
)  # fmt: skip


def engine_config(limits: BuildLimits) -> EngineConfig:
    checkpoint = CheckpointConfig(model=MODEL, world_size=1, dtype="float32")
    return EngineConfig(backend="cpu", checkpoint=checkpoint, limits=limits.resolve(64))


def make_space(
    config: EngineConfig,
    num_blocks: int | tuple[int, ...],
    windows: tuple[int | None, ...] = (None,),
    *,
    reuse: bool = True,
    lead: int = 0,
) -> KvSpace:
    groups = [KvGroup(window, (layer_idx,)) for layer_idx, window in enumerate(windows)]
    counts = (num_blocks,) * len(groups) if isinstance(num_blocks, int) else num_blocks
    return KvSpace(groups, counts, BLOCK, step_tokens=config.limits.max_num_tokens, lead=lead, reuse=reuse)


class Cache:
    """What the ranks would hold: per group and block the tokens written. A step must find all that its windows read."""

    def __init__(self, windows: tuple[int | None, ...] = (None,)) -> None:
        self.windows = windows
        self.blocks: list[dict[int, list[int]]] = [{} for _ in windows]
        self.tables: dict[int, list[list[int]]] = {}

    def run(self, step: Step) -> int:
        """Checks and applies a step; returns how many tokens it computed."""
        tokens = step.batch.token_ids.tolist()
        written: set[tuple[int, int, int]] = set()
        for piece, share in zip(step.batch.sequences, step.shares, strict=True):
            tables = self.tables.setdefault(piece.slot, [[] for _ in self.windows])
            for table, news in zip(tables, piece.blocks or [()] * len(tables), strict=True):
                table[piece.first_block :] = news or table[piece.first_block :]
            new, tokens = tokens[: piece.num_tokens], tokens[piece.num_tokens :]
            expected = share.sequence.token_ids
            known = piece.num_tokens - len(share.guesses)
            assert new == [*expected[piece.past : piece.past + known], *share.guesses]
            for group, (window, table) in enumerate(zip(self.windows, tables, strict=True)):
                blocks = self.blocks[group]
                for position in range(0 if window is None else max(0, piece.past - window), piece.past):
                    assert blocks[table[position // BLOCK]][position % BLOCK] == expected[position]
                for position, token in enumerate(new, start=piece.past):
                    block = table[position // BLOCK]
                    assert block >= 0
                    assert (group, block, position % BLOCK) not in written, "two sequences write to one place"
                    written.add((group, block, position % BLOCK))
                    blocks.setdefault(block, [])[position % BLOCK :] = [token]
        return len(step.batch.token_ids)


def drive(
    scheduler: Scheduler,
    sequences: list[Sequence],
    limits: BuildLimits,
    cancel: dict[int, int] | None = None,
    windows: tuple[int | None, ...] = (None,),
    rng: random.Random | None = None,
) -> None:
    """Runs to the end; `cancel` maps steps to sequences that are cancelled before them. With `rng`, it guesses."""
    cache = Cache(windows)
    for number in range(3000):
        if cancel and number in cancel and sequences[cancel[number]].finish_reason is None:
            scheduler.cancel(sequences[cancel[number]])
        if not scheduler.has_work():
            return
        for sequence in scheduler.decoding() if rng else ():
            assert rng is not None
            at = len(sequence.output_ids)
            following = [40 + (at + index) % 3 for index in range(rng.randrange(8))]
            sequence.guesses = [token if rng.random() < 0.8 else 9 for token in following]
        step = scheduler.next_step()
        assert step is not None, "work, but no step: starved"
        assert 0 < cache.run(step) <= limits.max_num_tokens
        assert len({piece.slot for piece in step.batch.sequences}) == len(step.batch.sequences) <= limits.max_batch_size
        answer(step)
        scheduler.finish_step()
    raise AssertionError("did not end")


def answer(step: Step) -> None:
    """Draws 40, 41, 42, 40, ... for every sequence."""
    assert sum(share.num_rows for share in step.shares) == len(step.batch.logit_rows)
    for share in step.shares:
        following = 40 + (len(share.sequence.output_ids) + torch.arange(share.num_deciding)) % 3
        rows = torch.zeros(share.num_rows, MODEL.vocab_size)
        rows[share.num_rows - share.num_deciding :, :] = functional.one_hot(following, MODEL.vocab_size)
        share.sequence.take_rows(list(rows), share.num_deciding, share.guesses)


WINDOWS: tuple[tuple[int | None, ...], ...] = ((None,), (None, 3), (0,), (7,), (None, 1, 9), (4, 5), (None, 40))


def least_blocks(
    config: EngineConfig, windows: tuple[int | None, ...], length: int, spare: int = 0, lead: int = 0
) -> tuple[int, ...]:
    """Per group, what a sequence of this length needs when it is alone."""
    columns = -(-length // BLOCK)
    tokens = config.limits.max_num_tokens
    return tuple(KvGroup(w, ()).most_blocks([columns], BLOCK, tokens, lead) + spare for w in windows)


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 12), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150)
@given(
    requests=REQUESTS,
    slots=st.integers(1, 4),
    extra=st.integers(0, 20),
    spare=st.integers(0, 12),
    policy=st.sampled_from(POLICIES),
    reuse=st.booleans(),
    windows=st.sampled_from(WINDOWS),
    seed=st.one_of(st.none(), st.integers(0, 1000)),
    cancel=st.dictionaries(st.integers(0, 30), st.integers(0, 7), max_size=4),
)
def test_every_request_is_answered_and_every_block_comes_back(
    requests: list[tuple[list[int], int, bool]], slots: int, extra: int, spare: int, policy: str, reuse: bool,
    windows: tuple[int | None, ...], seed: int | None, cancel: dict[int, int],
) -> None:  # fmt: skip
    limits = BuildLimits(max_batch_size=slots, max_seq_len=64, max_num_tokens=slots + extra)
    config = engine_config(limits)
    # Barely enough for the largest alone, or a little more: memory is what they fight about.
    largest = max(len(prompt) + answer for prompt, answer, _ in requests)
    space = make_space(config, least_blocks(config, windows, largest, spare), windows, reuse=reuse)
    scheduler = Scheduler(config.limits, space, policy)
    sequences = []
    for index, (prompt, answer, context) in enumerate(requests):
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        request = Request(prompt_ids=tuple(prompt), params=params, context_logits=context)
        sequences.append(Sequence.start(index, request, config))
        scheduler.add(sequences[-1])
    cancel = {step: index for step, index in cancel.items() if index < len(sequences)}
    drive(scheduler, sequences, limits, cancel, windows, random.Random(seed) if seed is not None else None)
    for sequence, (prompt, answer, context) in zip(sequences, requests, strict=True):
        if sequence.finish_reason == "cancelled":
            assert sequence.index in cancel.values()
            continue
        assert sequence.finish_reason == "length"
        assert sequence.output_ids == [40 + i % 3 for i in range(answer)]
        assert len(sequence.prompt_logits) == (len(prompt) if context else 0)
    assert space.used() == [0] * len(windows)
    assert scheduler.num_preemptions == 0 or policy == "max_utilization"


def make(config: EngineConfig, index: int, prompt: range, answer: int) -> Sequence:
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    return Sequence.start(index, Request(prompt_ids=tuple(prompt), params=params), config)


def test_a_common_beginning_is_computed_once() -> None:
    limits = BuildLimits(max_batch_size=2, max_seq_len=64, max_num_tokens=64)
    config = engine_config(limits)
    scheduler = Scheduler(config.limits, make_space(config, 32))
    first, second = make(config, 0, range(20), 1), make(config, 1, range(22), 1)
    scheduler.add(first)
    drive(scheduler, [first], limits)
    scheduler.add(second)
    step = scheduler.next_step()
    assert step is not None
    assert [(piece.past, piece.num_tokens) for piece in step.batch.sequences] == [(20, 2)]
    assert scheduler.num_reused_tokens == 20


def test_a_whole_prompt_that_is_known_still_computes_its_last_token() -> None:
    limits = BuildLimits(max_batch_size=1, max_seq_len=64, max_num_tokens=64)
    config = engine_config(limits)
    scheduler = Scheduler(config.limits, make_space(config, 32))
    for index in range(2):
        sequence = make(config, index, range(8), 1)
        scheduler.add(sequence)
        step = scheduler.next_step()
        assert step is not None
        assert [(p.past, p.num_tokens) for p in step.batch.sequences] == [(0, 8) if index == 0 else (4, 4)]
        sequence.accept(1)
        scheduler.finish_step()


def test_running_answers_go_on_beside_long_prompts() -> None:
    limits = BuildLimits(max_batch_size=4, max_seq_len=64, max_num_tokens=8)
    config = engine_config(limits)
    scheduler = Scheduler(config.limits, make_space(config, 64))
    talker = make(config, 0, range(2), 20)
    scheduler.add(talker)
    step = scheduler.next_step()
    talker.accept(1)
    scheduler.finish_step()
    for index in (1, 2):
        scheduler.add(make(config, index, range(index, index + 40), 1))
    for _ in range(5):
        step = scheduler.next_step()
        assert step is not None
        counts = [piece.num_tokens for piece in step.batch.sequences]
        assert counts[0] == 1
        assert sum(counts) == 8
        assert max(counts[1:]) - min(counts[1:]) <= 1, "the long prompts share what is left evenly"
        talker.accept(1)
        scheduler.finish_step()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("length", "shared"), [(3, 0), (4, 0), (5, 4), (23, 20)])
def test_equal_prompts_wait_for_the_first_and_share_its_blocks(policy: str, length: int, shared: int) -> None:
    limits = BuildLimits(max_batch_size=5, max_seq_len=64, max_num_tokens=8)
    config = engine_config(limits)
    space = make_space(config, 100)
    scheduler = Scheduler(config.limits, space, policy)
    sequences = [make(config, index, range(length), 4) for index in range(4)]
    sequences.append(make(config, 4, range(30, 36), 4))
    for sequence in sequences:
        scheduler.add(sequence)
    step = scheduler.next_step()
    assert step is not None
    started = {piece.slot for piece in step.batch.sequences}
    assert started == {sequence.slot for sequence in (sequences if not shared else [sequences[0], sequences[4]])}
    answer(step)
    scheduler.finish_step()
    drive_on(scheduler)
    assert [len(sequence.output_ids) for sequence in sequences] == [4] * 5
    assert scheduler.num_reused_tokens == 3 * shared
    assert space.num_used == 0


def drive_on(scheduler: Scheduler) -> None:
    while (step := scheduler.next_step()) is not None:
        answer(step)
        scheduler.finish_step()


@pytest.mark.parametrize("policy", POLICIES)
def test_higher_priorities_start_first_and_give_way_last(policy: str) -> None:
    config = engine_config(BuildLimits(max_batch_size=2, max_seq_len=64, max_num_tokens=40))
    space = make_space(config, 8)
    scheduler = Scheduler(config.limits, space, policy)
    priorities = (0.5, 0.1, 1.0, 0.5)
    sequences = []
    for index, priority in enumerate(priorities):
        request = Request(prompt_ids=(index,) * 9, params=SamplingParams(max_tokens=12), priority=priority)
        sequences.append(Sequence.start(index, request, config))
        scheduler.add(sequences[-1])
    ended: list[int] = []
    while (step := scheduler.next_step()) is not None:
        answer(step)
        ended += [sequence.index for sequence in scheduler.finish_step()]
    assert ended == [2, 0, 3, 1]
    assert space.num_used == 0


def test_who_waits_for_a_guide_holds_neither_a_slot_nor_blocks() -> None:
    config = engine_config(BuildLimits(max_batch_size=1, max_seq_len=64, max_num_tokens=64))
    space = make_space(config, 6)
    scheduler = Scheduler(config.limits, space)
    held_up, other = make(config, 0, range(8), 10), make(config, 1, range(20, 28), 10)
    held_up.paused = True
    scheduler.add(held_up)
    scheduler.add(other)
    step = scheduler.next_step()
    assert step is not None
    assert [share.sequence for share in step.shares] == [other]
    scheduler.cancel(other)
    assert scheduler.next_step() is None
    assert space.num_used == 0
    held_up.paused = False
    step = scheduler.next_step()
    assert step is not None
    assert [share.sequence for share in step.shares] == [held_up]


def test_what_a_failed_sequence_computed_last_is_offered_to_nobody() -> None:
    """It has more of it than it has tokens, where guesses were computed with them."""
    config = engine_config(BuildLimits(max_batch_size=1, max_seq_len=64, max_num_tokens=64))
    space = make_space(config, 16)
    scheduler = Scheduler(config.limits, space)
    sequence = make(config, 0, range(8), 20)
    scheduler.add(sequence)
    scheduler.next_step()
    sequence.accept(40)
    scheduler.finish_step()
    sequence.guesses = [41] * 12
    step = scheduler.next_step()
    assert step is not None
    assert len(step.shares[0].guesses) == 12
    sequence.fail(PtError("its guide cannot be followed"))
    assert scheduler.finish_step() == [sequence]
    assert space.num_used == 0


def test_a_request_that_can_never_fit_is_refused() -> None:
    config = engine_config(BuildLimits(max_seq_len=64))
    scheduler = Scheduler(config.limits, make_space(config, 3))
    with pytest.raises(ConfigError, match="need 4 blocks of 4 tokens, the KV cache has 3"):
        scheduler.add(make(config, 0, range(10), 5))


def test_a_sequence_ends_at_its_end_token_and_keeps_it() -> None:
    config = engine_config(BuildLimits(max_seq_len=64))
    sequence = Sequence.start(0, Request(prompt_ids=(1,), params=SamplingParams(stop_token_ids=(9,))), config)
    sequence.accept(3)
    assert sequence.finish_reason is None
    sequence.accept(7)
    assert (sequence.finish_reason, sequence.stop_reason, sequence.output_ids) == ("stop", None, [3, 7])
    own = Sequence.start(0, Request(prompt_ids=(1,), params=SamplingParams(stop_token_ids=(9,))), config)
    own.accept(9)
    assert (own.finish_reason, own.stop_reason) == ("stop", 9)
    ignoring = Sequence.start(0, Request(prompt_ids=(1,), params=SamplingParams(ignore_eos=True, max_tokens=2)), config)
    ignoring.accept(7)
    ignoring.accept(7)
    assert ignoring.finish_reason == "length"


def test_an_answer_ends_where_the_room_does() -> None:
    config = engine_config(BuildLimits(max_seq_len=10))
    sequence = Sequence.start(0, Request(prompt_ids=(1,) * 8, params=SamplingParams(max_tokens=50)), config)
    assert sequence.max_new_tokens == 2


@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(1, 5),
            st.integers(0, 1000),
            st.lists(st.tuples(st.integers(-1, 99), st.integers(-1, 99)), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
    rows=st.lists(st.integers(0, 4), max_size=5),
)
def test_messages_carry_steps_unchanged(
    pieces: list[tuple[int, int, int, list[tuple[int, int]]]], rows: list[int]
) -> None:
    sequences = tuple(
        SequenceSlice(
            slot=slot, num_tokens=count, past=past, first_block=past // 32, blocks=tuple(zip(*blocks, strict=True))
        )
        for slot, count, past, blocks in pieces
    )
    batch = StepBatch(
        token_ids=torch.arange(sum(piece[1] for piece in pieces)),
        sequences=sequences,
        logit_rows=torch.tensor(rows, dtype=torch.int64),
        row_top_k=tuple(row % 3 for row in rows),
    )
    message = decode(encode(batch, 3))
    assert message is not None
    engine, decoded = message
    assert engine == 3
    assert decoded.sequences == sequences
    assert torch.equal(decoded.token_ids, batch.token_ids)
    assert torch.equal(decoded.logit_rows, batch.logit_rows)
    assert decoded.row_top_k == batch.row_top_k
    assert decode(STOP) is None
