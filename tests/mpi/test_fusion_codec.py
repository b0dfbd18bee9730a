"""Encoded fusions over real MPI ranks: the same bits everywhere, and answers as far from the exact ones as stated."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.comm.coding import CODECS, Coding
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.launch import launch_command
from pt_trtllm.runtime.request import Request
from pt_trtllm.testing.jobs import Job, read_context_logits
from pt_trtllm.testing.numeric import mean_kl_divergence

pytestmark = pytest.mark.mpi

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, *range(40 + 7 * index, 1000, 31)] for index in range(4)]
KL_BOUNDS = {"int8": 1e-3, "fp8": 1e-2, "int4": 0.15, "mxfp4": 0.25}
"""KL divergence to the uncompressed logits of the example model, nats per token, one-shot; twice that for two-shot."""


@dataclass
class Run:
    tokens: list[list[int]]
    digests: list[str]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    convert(ROOT / "examples/tiny-pt", folder / "c", ConvertOptions(world_size=4, dtype="float32"))
    build(folder / "c", folder / "e", BuildOptions())
    return folder / "e"


@pytest.fixture(scope="module")
def runs(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Coding, Run]:
    """The checks of fusion_codec_ranks.py, and the example model under every coding, in one MPI world."""
    folder = tmp_path_factory.mktemp("runs")
    params = SamplingParams(max_tokens=6)
    Job(requests=tuple(Request(prompt_ids=tuple(p), params=params, context_logits=True) for p in PROMPTS)).write(folder)
    program = Path(__file__).with_name("fusion_codec_ranks.py")
    command = [*launch_command(4), sys.executable, str(program), str(engine), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    runs = {}
    for index, result in enumerate(results):
        logits = read_context_logits(folder / f"{index}.safetensors")
        whole = torch.cat([logits[str(prompt)] for prompt in range(len(PROMPTS))])
        runs[Coding(**result["coding"])] = Run(result["tokens"], result["digests"], whole)
    return runs


def divergence(runs: dict[Coding, Run], coding: Coding) -> float:
    return mean_kl_divergence(runs[coding].logits, runs[Coding()].logits)


def test_every_rank_has_the_same_bits_under_every_coding(runs: dict[Coding, Run]) -> None:
    assert len(runs) == 1 + 4 * 2 * 2
    for coding, run in runs.items():
        assert len(set(run.digests)) == 1, coding
    assert len({run.digests[0] for run in runs.values()}) == len(runs)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_logits_stay_within_the_stated_distance(runs: dict[Coding, Run], codec: str) -> None:
    assert 0 < divergence(runs, Coding(codec=codec, algorithm="one_shot")) < KL_BOUNDS[codec]
    assert 0 < divergence(runs, Coding(codec=codec, algorithm="two_shot")) < 2 * KL_BOUNDS[codec]


def test_errors_grow_as_bits_shrink(runs: dict[Coding, Run]) -> None:
    for algorithm in ("one_shot", "two_shot"):
        by_bits = [divergence(runs, Coding(codec=codec, algorithm=algorithm)) for codec in CODECS[1:]]
        assert by_bits == sorted(by_bits)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_a_second_rounding_costs_and_delta_pays(runs: dict[Coding, Run], codec: str) -> None:
    once = divergence(runs, Coding(codec=codec, algorithm="one_shot"))
    assert once < divergence(runs, Coding(codec=codec, algorithm="two_shot"))
    assert divergence(runs, Coding(codec=codec, delta=True, algorithm="one_shot")) < once


def test_eight_bits_give_the_answers_of_the_uncompressed_model(runs: dict[Coding, Run]) -> None:
    assert runs[Coding(codec="int8", algorithm="one_shot")].tokens == runs[Coding()].tokens


def test_the_python_api_takes_a_codec(engine: Path, runs: dict[Coding, Run]) -> None:
    options = RuntimeOptions(fusion_codec="mxfp4", fusion_algorithm="one_shot", fusion_delta=True)
    with LLM(engine, options=options) as llm:
        results = llm.generate(PROMPTS, SamplingParams(max_tokens=6), prompt_logits=True)
    expected = runs[Coding(codec="mxfp4", delta=True, algorithm="one_shot")]
    assert [list(result.outputs[0].token_ids) for result in results] == expected.tokens
    logits = torch.cat([result.prompt_logits for result in results if result.prompt_logits is not None])
    assert torch.equal(logits, expected.logits)


def test_impossible_options_are_refused(engine: Path) -> None:
    with pytest.raises(ConfigError, match="fusion_codec is 'int5', expected one of"):
        RuntimeOptions(fusion_codec="int5")
    with pytest.raises(ConfigError, match="fusion_algorithm is 'ring', expected one of"):
        RuntimeOptions(fusion_codec="int8", fusion_algorithm="ring")
    with pytest.raises(ConfigError, match="without a codec nothing is rounded"):
        RuntimeOptions(fusion_delta=True)
