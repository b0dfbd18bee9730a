"""Speculative decoding over real ranks: every way to guess gives the answers of plain decoding."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.runtime.speculative.config import SpeculativeConfig
from pt_trtllm.testing.cli import check_cli, refusal
from pt_trtllm.testing.processes import wait_until_gone

pytestmark = pytest.mark.mpi

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
Texts = list[tuple[str | None, tuple[int, ...]]]
PROMPTS = ["It is a truth", "She had never been so", "The evening was", "My dear Mr. Bennet,"]
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, temperature=0.8, top_k=20, seed=3),
    SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=4, stop="."),
    SamplingParams(max_tokens=24, repetition_penalty=1.3, logprobs=1),
]
WAYS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram"},
    "a draft on rank 0": {"method": "draft", "draft_engine_dir": "coarse1"},
    "a draft on the same ranks": {"method": "draft", "draft_engine_dir": "coarse2"},
    "a draft on a rank of its own": {"method": "draft", "draft_engine_dir": "coarse1", "draft_placement": "own_ranks"},
    "a draft on ranks of its own": {"method": "draft", "draft_engine_dir": "coarse2", "draft_placement": "own_ranks"},
}
OWN_RANKS = {"a draft on a rank of its own": 1, "a draft on ranks of its own": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example for 1 and 2 ranks with int4 weights, to guess with."""
    folder = tmp_path_factory.mktemp("engines")
    quantization, limits = Quantization(method="int4_wo", group_size=32), BuildLimits(max_batch_size=4, max_seq_len=128)
    for ranks in (1, 2):
        options = ConvertOptions(world_size=ranks, dtype="float32", quantization=quantization)
        convert(EXAMPLE, folder / f"c{ranks}", options)
        build(folder / f"c{ranks}", folder / f"coarse{ranks}", BuildOptions(limits=limits))
    return folder


@pytest.fixture(scope="module")
def plain(example_llm: LLM) -> Texts:
    return texts(example_llm)


def texts(llm: LLM) -> Texts:
    return [(result.outputs[0].text, result.outputs[0].token_ids) for result in llm.generate(PROMPTS, PARAMS)]


def speculative(folder: Path, way: str) -> RuntimeOptions:
    options = dict(WAYS[way])
    if "draft_engine_dir" in options:
        options["draft_engine_dir"] = str(folder / options["draft_engine_dir"])
    return RuntimeOptions(speculative=SpeculativeConfig(**options))


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_plain_decoding_and_nobody_is_left(
    folder: Path, example_engines: dict[int, Path], plain: Texts, way: str
) -> None:
    with LLM(example_engines[2], options=speculative(folder, way)) as llm:
        assert texts(llm) == plain
        stats, children = llm.stats(), draft_ranks(folder)
    assert len(children) == OWN_RANKS.get(way, 0)
    wait_until_gone(children)
    assert stats["kv_blocks_used"] == 0
    assert stats["accepted_tokens"] <= stats["drafted_tokens"]
    if not way.endswith("own"):  # guesses from elsewhere may come too late to be used
        assert stats["accepted_tokens"] > 0


def test_one_rank_and_a_draft_of_its_own(folder: Path, example_engines: dict[int, Path], plain: Texts) -> None:
    with LLM(example_engines[1], options=speculative(folder, "a draft on a rank of its own")) as llm:
        assert texts(llm) == plain


def test_a_draft_that_dies_holds_nothing_up(folder: Path, example_engines: dict[int, Path], plain: Texts) -> None:
    with LLM(example_engines[2], options=speculative(folder, "a draft on ranks of its own")) as llm:
        children = draft_ranks(folder)
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        wait_until_gone(children)
        assert texts(llm) == plain
    wait_until_gone(children)


def draft_ranks(folder: Path) -> list[int]:
    """Processes that run a coarse engine by itself, launchers aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[1:2] == ["-m"] and {str(folder / "coarse1"), str(folder / "coarse2")} & set(words):
            found.append(int(entry.name))
    return found


def test_the_command_line_says_how_many_guesses_were_right(
    folder: Path, example_engines: dict[int, Path], tmp_path: Path
) -> None:
    engine = example_engines[1]
    done = check_cli(
        "run", "--engine-dir", engine, "--prompt", PROMPTS[0], "--max-new-tokens", 24, "--speculative", "draft",
        "--draft-engine-dir", folder / "coarse1", "--max-draft-len", 3, "--output-json", tmp_path / "o.json",
    )  # fmt: skip
    stats = json.loads((tmp_path / "o.json").read_text())["stats"]
    assert f"{stats['accepted_tokens']} of {stats['drafted_tokens']} guesses right" in done.stderr
    line = refusal("run", "--engine-dir", engine, "--prompt", "x", "--draft-engine-dir", folder / "coarse1")
    assert "--draft-engine-dir was given; it needs --speculative draft" in line
