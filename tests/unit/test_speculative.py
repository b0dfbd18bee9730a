"""Guesses change nothing but the number of passes; a real engine of one rank answers, whatever is guessed."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceABC
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.network.logits import Logits
from pt_trtllm.runtime.core import Engine, EngineCore
from pt_trtllm.runtime.opening import open_engine
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request, Sequence
from pt_trtllm.runtime.sampling import Sampler, SamplingParams
from pt_trtllm.runtime.speculative.config import SpeculativeConfig
from pt_trtllm.runtime.speculative.draft_model import DraftModel
from pt_trtllm.runtime.speculative.in_place import InPlaceProposer
from pt_trtllm.runtime.speculative.ngram import NgramIndex, NgramProposer
from pt_trtllm.runtime.speculative.proposer import Proposer
from pt_trtllm.runtime.speculative.set_up import alone, check_draft
from pt_trtllm.testing.cases import BASE
from pt_trtllm.testing.reference import build_model, save_checkpoint

pytestmark = pytest.mark.unit

VOCAB = int(BASE["vocab_size"])
PARAMS = [
    SamplingParams(max_tokens=14, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=0.8, seed=1),
    SamplingParams(max_tokens=12, temperature=1.2, top_k=7, seed=2),
    SamplingParams(max_tokens=13, temperature=0.9, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4, seed=3),
    SamplingParams(
        max_tokens=11, logit_bias={3: 4.0}, bad_words_ids=((5,), (6, 7)), min_tokens=4, temperature=1, seed=4
    ),
    SamplingParams(max_tokens=10, logprobs=2, prompt_logprobs=1, min_p=0.02, temperature=1.1, seed=5),
]


def open_local(folder: Path) -> Engine:
    config, _ = open_bundle(folder)
    return open_engine(folder, config, LocalCommunicator(), RuntimeOptions())[0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_local(make_engine(tmp_path_factory.mktemp("target"), seed=0))


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """The same model, the same with coarse weights, and one that has nothing in common with it but the vocabulary."""
    folder = tmp_path_factory.mktemp("drafts")
    return {
        "equal": open_local(make_engine(folder / "equal", seed=0)),
        "coarse": open_local(make_engine(folder / "coarse", seed=0, quantization="int4_wo")),
        "another": open_local(make_engine(folder / "another", seed=1, num_tracks=1)),
    }


def make_engine(folder: Path, seed: int, quantization: str = "none", num_tracks: int = 2) -> Path:
    config = {**BASE, "num_tracks": num_tracks}
    save_checkpoint(build_model(config, seed), config, folder / "source")
    convert(
        folder / "source",
        folder / "checkpoint",
        ConvertOptions(world_size=1, quantization=Quantization(method=quantization, group_size=32)),
    )
    limits = BuildLimits(max_batch_size=4, max_seq_len=96, max_num_tokens=20)
    build(folder / "checkpoint", folder / "engine", BuildOptions(limits=limits))
    return folder / "engine"


def requests(count: int = 6, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 40) for _ in range(count)]
    prompts = [tuple(rng.randrange(12) for _ in range(length)) for length in lengths]
    return [Request(prompt_ids=prompt, params=PARAMS[i % len(PARAMS)]) for i, prompt in enumerate(prompts)]


def answers(
    engine: Engine, options: RuntimeOptions, proposer: Proposer | None = None
) -> tuple[list[Sequence], EngineCore]:
    core = EngineCore(engine, options, proposer=proposer)
    sequences = [core.add(request) for request in requests()]
    while core.has_work():
        core.step()
    assert core._space.num_used == 0
    return sequences, core


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[Sequence]:
    return answers(engine, RuntimeOptions())[0]


def assert_same(found: SequenceABC[Sequence], expected: SequenceABC[Sequence]) -> None:
    assert [s.output_ids for s in found] == [s.output_ids for s in expected]
    assert [s.finish_reason for s in found] == [s.finish_reason for s in expected]
    assert [[row[0][0] for row in s.logprobs] for s in found] == [[row[0][0] for row in s.logprobs] for s in expected]
    assert [len(s.prompt_logprobs) for s in found] == [len(s.prompt_logprobs) for s in expected]


class Oracle:
    """Knows the answers, and spoils some of its guesses."""

    def __init__(self, expected: SequenceABC[Sequence], rng: random.Random, spoil: float) -> None:
        self._expected, self._rng, self._spoil = expected, rng, spoil
        self.forgotten: list[int] = []

    def propose(self, sequences: SequenceABC[Sequence]) -> None:
        for sequence in sequences:
            known, count = len(sequence.output_ids), self._rng.randrange(8)
            following = self._expected[sequence.index].output_ids[known : known + count]
            following += [self._rng.randrange(VOCAB) for _ in range(count - len(following))]
            sequence.guesses = [
                t if self._rng.random() > self._spoil else self._rng.randrange(VOCAB) for t in following
            ]

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.index)

    def close(self) -> None: ...


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    spoil=st.sampled_from([0.0, 0.3, 1.0]),
    blocks=st.integers(3, 12),
    policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
)
def test_answers_are_those_of_plain_decoding_whatever_is_guessed(
    engine: Engine, plain: list[Sequence], seed: int, spoil: float, blocks: int, policy: str
) -> None:
    oracle = Oracle(plain, random.Random(seed), spoil)
    options = RuntimeOptions(max_tokens_in_paged_kv_cache=32 * blocks, scheduler_policy=policy)
    found, core = answers(engine, options, oracle)
    assert_same(found, plain)
    assert sorted(oracle.forgotten) == list(range(len(plain)))
    assert core._stats.accepted_tokens <= core._stats.drafted_tokens
    if spoil == 0.0:
        assert core._stats.accepted_tokens > 0


def test_good_guesses_save_passes(engine: Engine, plain: list[Sequence]) -> None:
    _, without = answers(engine, RuntimeOptions())
    _, with_guesses = answers(engine, RuntimeOptions(), Oracle(plain, random.Random(0), 0.0))
    assert with_guesses.stats().forward_passes < 0.7 * without.stats().forward_passes


@pytest.mark.parametrize("name", ["equal", "coarse", "another"])
def test_a_draft_engine_changes_nothing(
    engine: Engine, drafts: dict[str, Engine], plain: list[Sequence], name: str
) -> None:
    draft = drafts[name]
    check_draft(draft.config, engine.config, SpeculativeConfig(method="draft", draft_engine_dir="d"))
    options = RuntimeOptions(max_tokens_in_paged_kv_cache=12 * 32, guesses_ahead=4)
    space = options.kv_space(draft.config, shares_blocks=True)
    model = DraftModel(draft.config, space, alone(draft))
    found, core = answers(engine, RuntimeOptions(), InPlaceProposer(model, 4))
    assert_same(found, plain)
    stats, scheduler = core._stats, model._scheduler
    assert stats.drafted_tokens > 0
    if name == "equal":  # the same random numbers, the same logits
        assert stats.accepted_tokens == stats.drafted_tokens
    if name == "coarse":
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert (scheduler.num_running, scheduler.num_waiting, scheduler._space.num_used) == (0, 0, 0)


def test_ngrams_change_nothing(engine: Engine, plain: list[Sequence]) -> None:
    found, core = answers(engine, RuntimeOptions(), NgramProposer(5, 3))
    assert_same(found, plain)
    assert core._stats.drafted_tokens > 0


def test_a_cancelled_sequence_is_forgotten(engine: Engine, plain: list[Sequence]) -> None:
    oracle = Oracle(plain, random.Random(0), 0.5)
    core = EngineCore(engine, RuntimeOptions(), proposer=oracle)
    sequence = core.add(requests()[0])
    core.step()
    core.cancel(sequence)
    assert oracle.forgotten == [0]
    assert core._space.num_used == 0


@given(text=st.lists(st.integers(0, 3), max_size=40), size=st.integers(1, 4), count=st.integers(1, 5))
def test_ngrams_are_looked_up_as_a_plain_search_does(text: list[int], size: int, count: int) -> None:
    expected: list[int] = []
    for length in range(min(size, len(text)), 0, -1):
        ends = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
        if ends:
            expected = text[ends[-1] : ends[-1] + count]
            break
    index = NgramIndex(size, text[: len(text) // 2])
    index.extend(text[len(text) // 2 :])
    assert index.length == len(text)
    assert index.continuation(count) == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "repetition_penalty": 1.2}, {"bad_words_ids": ((1, 2),)}])
def test_a_fork_draws_the_same_and_leaves_its_origin_alone(options: dict[str, object]) -> None:
    sampler = Sampler(SamplingParams(seed=5, **options), [1, 2], 50, frozenset())  # type: ignore[arg-type]
    rows = [3 * torch.randn(50, generator=torch.Generator().manual_seed(n)) for n in range(12)]
    for row in rows[:4]:
        sampler.next_token(row, 0)
    fork, watching = sampler.fork(), sampler.fork()
    ahead = [fork.next_token(row, 0) for row in rows[4:8]]
    assert [sampler.next_token(row, 0) for row in rows[4:8]] == ahead
    for token in ahead:
        watching.observe(token)
    assert [watching.next_token(row, 0) for row in rows[8:]] == [sampler.next_token(row, 0) for row in rows[8:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, r"method is 'magic', expected one of \['ngram', 'draft'\]"),
        ({"method": "ngram", "max_draft_len": 0}, "max_draft_len is 0, expected 1 to 64"),
        ({"method": "ngram", "max_matching_ngram_size": 99}, "max_matching_ngram_size is 99, expected 1 to 16"),
        ({"method": "draft"}, "method is 'draft' with draft_engine_dir None"),
        ({"method": "ngram", "draft_engine_dir": "d"}, "method is 'ngram' with draft_engine_dir 'd'"),
        ({"method": "ngram", "draft_placement": "moon"}, "draft_placement is 'moon'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig(**options)  # type: ignore[arg-type]


def test_options_travel_as_text() -> None:
    options = RuntimeOptions(speculative=SpeculativeConfig(method="ngram", max_draft_len=7))
    assert RuntimeOptions.from_bytes(options.to_bytes()) == options


def test_another_vocabulary_is_refused(engine: Engine, tmp_path: Path) -> None:
    config = {**BASE, "vocab_size": 60}
    save_checkpoint(build_model(config), config, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "checkpoint", ConvertOptions(world_size=1))
    build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(limits=BuildLimits(max_seq_len=64)))
    with pytest.raises(ConfigError, match=f"vocabulary of 60 tokens, expected the engine's own {VOCAB}"):
        check_draft(
            open_bundle(tmp_path / "engine")[0],
            engine.config,
            SpeculativeConfig(method="draft", draft_engine_dir=str(tmp_path / "engine")),
        )


def test_reused_prefixes_give_the_very_same_logits(engine: Engine) -> None:
    """The whole row behind the prompt, with and without the blocks of an earlier prompt that began alike."""
    seen: list[torch.Tensor] = []

    class Watching:
        def __init__(self) -> None:
            self.config, self.comm = engine.config, engine.comm
            self.num_passes, self.shares_blocks = 0, True

        def forward(self, batch: object) -> Logits | None:
            logits = engine.forward(batch)  # type: ignore[arg-type]
            assert logits is not None
            self.num_passes += 1
            seen.extend(row for row in logits.rows if isinstance(row, torch.Tensor))
            return logits

        def close(self) -> None:
            return

    common, params = tuple(i % 13 for i in range(70)), SamplingParams(max_tokens=5, temperature=1.0, seed=1)
    rows = []
    for reuse in (True, False):
        core = EngineCore(Watching(), RuntimeOptions(enable_block_reuse=reuse))
        for ending in ((1, 2), (3, 4, 5)):
            core.add(Request(prompt_ids=common + ending, params=params))
            while core.has_work():
                core.step()
        assert core._scheduler.num_reused_tokens == (64 if reuse else 0)
        rows.append(torch.stack(seen))
        seen.clear()
    assert torch.equal(rows[0], rows[1])
