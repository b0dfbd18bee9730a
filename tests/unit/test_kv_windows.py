"""Layers with a window keep what the tokens to come see, no less and hardly more: plans, drafts, and a real engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig, open_bundle
from pt_trtllm.engine.cpu import CpuEngine
from pt_trtllm.network.kv_cache import BLOCK_TOKENS, block_bytes
from pt_trtllm.network.kv_groups import KvGroup, kv_groups
from pt_trtllm.network.logits import Logits
from pt_trtllm.network.step import StepBatch
from pt_trtllm.runtime import options as runtime_options
from pt_trtllm.runtime.core import EngineCore
from pt_trtllm.runtime.kv_space import FREED, KvSpace
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.scheduler import POLICIES, Scheduler
from pt_trtllm.runtime.speculative.draft_model import DraftModel, Mirror
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint

pytestmark = pytest.mark.unit

BLOCK = 4
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "intermediate_size": 32, "eos_token_id": (7,)}
LOCAL, GLOBAL = "local_rope", "global_nope"


def model_of(*pattern: str, window: int, max_seq_len: int = 512) -> ModelConfig:
    return ModelConfig(
        vocab_size=50, num_hidden_layers=len(pattern), attention_pattern=pattern, attention_window=window,
        max_position_embeddings=max_seq_len, **SIZES,
    )  # type: ignore[arg-type]  # fmt: skip


def config_of(model: ModelConfig, **limits: int) -> EngineConfig:
    checkpoint = CheckpointConfig(model=model, world_size=1, dtype="float32")
    return EngineConfig(backend="cpu", checkpoint=checkpoint, limits=BuildLimits(**limits).resolve(512))


def space_of(windows: tuple[int | None, ...], num_blocks: int, step_tokens: int, lead: int = 0) -> KvSpace:
    groups = [KvGroup(window, (layer_idx,)) for layer_idx, window in enumerate(windows)]
    return KvSpace(groups, [num_blocks] * len(groups), BLOCK, step_tokens=step_tokens, lead=lead)


def test_layers_that_see_equally_far_are_one_group() -> None:
    model = model_of(LOCAL, LOCAL, GLOBAL, LOCAL, window=9)
    assert kv_groups(model, 512) == (KvGroup(None, (2,)), KvGroup(9, (0, 1, 3)))
    assert kv_groups(model, 11) == (KvGroup(None, (2,)), KvGroup(9, (0, 1, 3)))
    assert kv_groups(model, 10) == (KvGroup(None, (0, 1, 2, 3)),), "the tenth token sees the first"
    assert kv_groups(model_of(LOCAL, window=9), 512) == (KvGroup(9, (0,)),)


@pytest.mark.parametrize("window", [0, 1, 3, 4, 5, 8, 11])
def test_exactly_what_the_next_token_sees_is_held(window: int) -> None:
    config = config_of(model_of(LOCAL, GLOBAL, window=window), max_batch_size=1, max_seq_len=64, max_num_tokens=8)
    scheduler = Scheduler(config.limits, space_of((None, window), 16, 8))
    sequence = Sequence.start(0, Request(prompt_ids=(1,) * 11, params=SamplingParams(max_tokens=40)), config)
    scheduler.add(sequence)
    while scheduler.has_work():
        step = scheduler.next_step()
        assert step is not None
        if step.shares[0].num_rows:
            sequence.accept(1)
        scheduler.finish_step()
        position = sequence.num_computed  # of the next token
        if sequence.finish_reason is None:
            full, windowed = sequence.held.tables
            seen = [
                any(max(0, position - window) <= c * BLOCK + i <= position for i in range(BLOCK)) for c in range(16)
            ]
            assert len(full) == len(windowed) == -(-position // BLOCK)
            assert FREED not in full
            assert [block != FREED for block in windowed] == seen[: len(windowed)]
    assert scheduler.num_running == 0


class FakeRanks:
    """A draft's engine: checks that what a window sees is what was computed, and answers with random tokens."""

    def __init__(self, windows: tuple[int | None, ...], rng: random.Random) -> None:
        self.windows, self.rng = windows, rng
        self.model: DraftModel
        self.content: list[dict[tuple[int, int], int]] = [{} for _ in windows]
        self.tables: dict[int, list[list[int]]] = {}

    def forward(self, batch: StepBatch) -> Logits:
        owners = {sequence.slot: sequence for sequence in self.model._scheduler._running}
        tokens = iter(batch.token_ids.tolist())
        for piece in batch.sequences:
            tables = self.tables.setdefault(piece.slot, [[] for _ in self.windows])
            for group, news in enumerate(piece.blocks):
                tables[group][piece.first_block :] = news
            expected, new = owners[piece.slot].token_ids, [next(tokens) for _ in range(piece.num_tokens)]
            assert new == expected[piece.past : piece.past + piece.num_tokens]
            for window, table, content in zip(self.windows, tables, self.content, strict=True):
                for at, token in enumerate(new, start=piece.past):
                    content[table[at // BLOCK], at % BLOCK] = token
                for at in range(0 if window is None else max(0, piece.past - window), piece.past):
                    assert content[table[at // BLOCK], at % BLOCK] == expected[at], "overwritten, or another's"
        ids = torch.tensor([self.rng.randrange(3) for _ in batch.logit_rows], dtype=torch.int64)
        return Logits(rows=list(functional.one_hot(ids, 50).float()), finite=True)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    windows=st.sampled_from([(None,), (None, 3), (0,), (6,), (None, 2, 9)]),
    lead=st.integers(1, 9),
    slots=st.integers(1, 3),
)
def test_a_draft_can_always_go_back_to_what_is_certain(
    seed: int, windows: tuple[int | None, ...], lead: int, slots: int
) -> None:
    """With no more memory than its sequences are said to need."""
    rng = random.Random(seed)
    config = config_of(model_of(GLOBAL, window=1), max_batch_size=slots, max_seq_len=64, max_num_tokens=slots + 3)
    groups = [KvGroup(window, ()) for window in windows]
    num_blocks = [group.most_blocks([16] * slots, BLOCK, slots + 3, lead) for group in groups]
    space = KvSpace(groups, num_blocks, BLOCK, step_tokens=slots + 3, lead=lead)
    ranks = FakeRanks(windows, rng)
    model = ranks.model = DraftModel(config, space, ranks.forward)
    mirrors: list[Mirror] = []
    for _ in range(120):
        if len(mirrors) < slots and rng.random() < 0.3:
            prompt = tuple(rng.randrange(2) for _ in range(rng.randrange(1, 20)))
            mirror = model.start(Request(prompt_ids=prompt, params=SamplingParams(max_tokens=44)), 1)
            assert mirror is not None
            mirrors.append(mirror)
        for _ in range(rng.randrange(1, 1 + 2 * lead)):
            model.advance(mirrors, lead)
        for mirror in list(mirrors):
            tokens = mirror.guesses[: rng.randrange(1 + lead)]
            tokens += [rng.randrange(3) for _ in range(rng.randrange(3))]
            if mirror.num_decided + len(tokens) >= mirror.sequence.max_new_tokens or rng.random() < 0.03:
                model.end(mirror)
                mirrors.remove(mirror)
            else:
                model.decide(mirror, tokens)
    for mirror in mirrors:
        model.end(mirror)
    assert space.used() == [0] * len(windows)


def test_a_windowed_prefix_is_found_where_its_end_is_still_known() -> None:
    """The blocks before the window were given to others; the full layers have all of theirs."""
    config = config_of(model_of(LOCAL, GLOBAL, window=4), max_batch_size=1, max_seq_len=64, max_num_tokens=64)
    groups = (KvGroup(None, (1,)), KvGroup(4, (0,)))

    def reused(num_windowed: int, prompt: tuple[int, ...]) -> list[int]:
        scheduler = Scheduler(config.limits, KvSpace(groups, (32, num_windowed), BLOCK, step_tokens=64))
        for index, tokens in enumerate([tuple(range(20)), tuple(range(30, 50)), prompt]):
            sequence = Sequence.start(index, Request(prompt_ids=tokens, params=SamplingParams(max_tokens=1)), config)
            scheduler.add(sequence)
            step = scheduler.next_step()
            assert step is not None
            past, blocks = step.batch.sequences[0].past, step.batch.sequences[0].blocks
            sequence.accept(1)
            scheduler.finish_step()
        return [past, *(group.count(FREED) for group in blocks)]

    whole = (*range(20), 1, 2)
    assert reused(16, whole) == [20, 0, 4]
    assert reused(16, (*range(13), 1, 2)) == [12, 0, 2]
    assert reused(16, (1, *range(1, 20))) == [0, 0, 0]
    # The second prompt takes windowed blocks over: the first's columns 3, 2 and 1, then 0. The last one stays.
    assert reused(7, whole) == [20, 0, 4]
    assert reused(7, (*range(13), 1, 2)) == [4, 0, 0]
    assert reused(6, (*range(13), 1, 2)) == [0, 0, 0]


LIMITS = BuildLimits(max_batch_size=3, max_seq_len=384, max_num_tokens=48)
PATTERNS = {"mixed": (LOCAL, GLOBAL), "all windowed": (LOCAL, LOCAL), "of the current token only": (LOCAL, GLOBAL)}


@pytest.fixture(scope="module", params=PATTERNS)
def engine_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    model = model_of(*PATTERNS[request.param], window=0 if "current" in request.param else 40)
    write_big_checkpoint(folder / "source", 0, model)
    convert(folder / "source", folder / "checkpoint", ConvertOptions(world_size=1, dtype="float32"))
    build(folder / "checkpoint", folder / "engine", BuildOptions(limits=LIMITS))
    return folder / "engine"


def core_of(engine_dir: Path, **options: object) -> EngineCore:
    config, _ = open_bundle(engine_dir)
    settled = RuntimeOptions(**options).settled(config)  # type: ignore[arg-type]
    return EngineCore(CpuEngine(engine_dir, config, LocalCommunicator(), settled.num_blocks(config)), settled)


def answer(core: EngineCore, prompt: tuple[int, ...], count: int = 40) -> Sequence:
    params = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=3)
    sequence = core.add(Request(prompt_ids=prompt, params=params))
    while core.has_work():
        core.step()
    return sequence


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_taken_over_by_others_changes_no_answer(engine_dir: Path, policy: str) -> None:
    """Three long answers at once in memory for hardly more than one, against each alone in plenty."""
    prompts = [tuple((3 * i + 7 * n) % 50 for i in range(90 + 50 * n)) for n in range(3)]
    core = core_of(engine_dir, scheduler_policy=policy, max_tokens_in_paged_kv_cache=11 * BLOCK_TOKENS)
    params = SamplingParams(max_tokens=120, ignore_eos=True, logprobs=3)
    together = [core.add(Request(prompt_ids=prompt, params=params)) for prompt in prompts]
    while core.has_work():
        core.step()
    assert core.stats().kv_blocks_left_behind > 0
    assert core.stats().kv_blocks_used == 0
    for found, prompt in zip(together, prompts, strict=True):
        alone = answer(core_of(engine_dir, enable_block_reuse=False), prompt, 120)
        assert found.output_ids == alone.output_ids
        assert found.logprobs == alone.logprobs


def test_a_reused_prefix_changes_no_bit(engine_dir: Path) -> None:
    core = core_of(engine_dir)
    common = tuple(5 + 7 * i % 40 for i in range(140))
    for ending in ((1, 2), (3, 4, 5)):
        again = answer(core, common + ending)
        fresh = answer(core_of(engine_dir, enable_block_reuse=False), common + ending)
        assert (again.output_ids, again.logprobs) == (fresh.output_ids, fresh.logprobs)
    assert core.stats().reused_tokens == 128


def test_a_long_sequence_holds_a_bounded_number_of_blocks() -> None:
    config = config_of(model_of(LOCAL, window=20), max_batch_size=1, max_seq_len=512, max_num_tokens=16)
    space = RuntimeOptions().kv_space(config, shares_blocks=True)
    scheduler = Scheduler(config.limits, space)
    sequence = Sequence.start(0, Request(prompt_ids=(1,) * 100, params=SamplingParams(max_tokens=400)), config)
    scheduler.add(sequence)
    while (step := scheduler.next_step()) is not None:
        assert space.num_used <= 2  # 21 tokens, wherever they begin
        if step.shares[0].num_rows:
            sequence.accept(1)
        scheduler.finish_step()
    assert len(sequence.output_ids) == 400
    assert space.num_blocks == 3


def test_windows_buy_tokens_for_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"max_batch_size": 4, "max_seq_len": 512, "max_num_tokens": 32}
    sizes = {}
    for name, pattern in {"full": (GLOBAL,) * 4, "mixed": (LOCAL, LOCAL, LOCAL, GLOBAL)}.items():
        config = config_of(model_of(*pattern, window=32), **limits)
        whole = block_bytes(config.checkpoint.model, config.mapping, torch.float32, KvGroup(None, (0, 1, 2, 3)))
        monkeypatch.setattr(runtime_options, "available_bytes", lambda whole=whole: 2 * 24 * whole)
        options = RuntimeOptions()
        sizes[name] = options.num_blocks(config)
        assert options.settled(config).num_blocks(config) == sizes[name]
        groups = kv_groups(config.checkpoint.model, 512)
        taken = [
            count * block_bytes(config.checkpoint.model, config.mapping, torch.float32, group)
            for count, group in zip(sizes[name], groups, strict=True)
        ]
        assert sum(taken) <= 24 * whole
    windowed = 4 * 3 + 1  # a block that ends, the window's, and the one that grows; and a step's worth
    assert sizes == {"full": (24,), "mixed": (4 * 24 - 3 * windowed, windowed)}
    assert BLOCK_TOKENS == 32
